//! The guest images, made from Debian packages.
//!
//! Both images are one ext4 file system on a raw, sparse disk, and name their
//! kernel, so that a machine boots it directly:
//!
//! | object | what it is |
//! |---|---|
//! | `NAME.raw` | the disk |
//! | `cloud.vmlinux` | Debian's cloud kernel, unpacked (saves the guest 0.4 s) |
//! | `cloud.initrd` | busybox, the virtio modules, and `image/init` |
//! | `NAME.json` | the manifest: written last, so an image with one is whole |
//!
//! `mini` is a tree of unconfigured packages with busybox as init; `debian-12`
//! is a configured system with systemd and the distribution's own cloud-init.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use crate::progress::Step;

/// Rises when a recipe below changes, so that caches are made again.
const RECIPE: &str = "4";
const SUITE: &str = "bookworm";
const COMMAND_LINE: &str = "root=/dev/vda console=ttyS0 quiet no_timer_check cryptomgr.notests mitigations=off random.trust_cpu=on";

const MINI_PACKAGES: &str = "busybox-static,dash,bash,openssh-server,sudo,curl,ca-certificates,e2fsprogs,iperf3,iputils-ping";
const DEBIAN_PACKAGES: &str = "systemd,systemd-sysv,systemd-resolved,udev,dbus,openssh-server,cloud-init,sudo,curl,ca-certificates,\
                               e2fsprogs,cloud-guest-utils,isc-dhcp-client,iproute2,iputils-ping,kmod,less,nano-tiny";

/// Modules that the initial root loads, by path below `kernel/`.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/net/virtio_net",
    "drivers/char/hw_random/virtio-rng",
    "drivers/acpi/button",
    "drivers/input/evdev",
];

/// True when the image is in the cache.
pub fn is_built(images: &Path, name: &str) -> bool {
    fs::read_to_string(images.join(format!("{name}.recipe"))).is_ok_and(|recipe| recipe == RECIPE)
        && images.join(format!("{name}.json")).exists()
}

/// Builds every image that is not in the cache.
pub fn all(images: &Path) -> Result<()> {
    fs::create_dir_all(images)?;
    stubs(images)?;
    mini(images)?;
    debian(images)
}

/// Builds `mini` unless it is in the cache.
pub fn mini(images: &Path) -> Result<()> {
    if is_built(images, "mini") {
        return Ok(());
    }
    let step = Step::begin("build image mini");
    let work = Work::new(images, "mini")?;
    kernel(images, &work, &step)?;
    step.note("packages");
    let tree = work.bootstrap("extract", MINI_PACKAGES)?;
    step.note("file system");
    mini_tree(&tree)?;
    work.disk(&tree, "mini", 1 << 30)?;
    manifest(images, "mini", "Minimal Linux: busybox, sshd, sudo, curl", "ec2-user", 1 << 30)?;
    step.end();
    Ok(())
}

/// Builds `debian-12` unless it is in the cache. Draws nothing, because it may
/// run beside a serving region.
pub fn debian(images: &Path) -> Result<()> {
    if is_built(images, "debian-12") {
        return Ok(());
    }
    let step = Step::begin("build image debian-12");
    let work = Work::new(images, "debian-12")?;
    kernel(images, &work, &step)?;
    step.note("packages");
    let tree = work.bootstrap("minbase", DEBIAN_PACKAGES)?;
    step.note("file system");
    debian_tree(&tree, &work)?;
    work.disk(&tree, "debian-12", 2 << 30)?;
    manifest(images, "debian-12", "Debian 12 with systemd and cloud-init", "admin", 2 << 30)?;
    step.end();
    Ok(())
}

/// Registrable stand-ins that the `sim` machine boots: a disk and no system.
pub fn stubs(images: &Path) -> Result<()> {
    for (name, platform) in [("windows-stub", "windows"), ("paravirtual-stub", "Linux")] {
        if is_built(images, name) {
            continue;
        }
        let size: u64 = 1 << 30;
        fs::File::create(images.join(format!("{name}.raw")))?.set_len(size)?;
        let text = json!({
            "name": name, "description": "Stand-in for machine sim: an empty disk", "object": format!("{name}.raw"),
            "size_bytes": size, "architecture": "x86_64", "platform": platform, "root_device_name": "/dev/sda1", "user": "none",
        });
        publish(images, name, &text)?;
    }
    Ok(())
}

fn manifest(images: &Path, name: &str, description: &str, user: &str, size_bytes: u64) -> Result<()> {
    let text = json!({
        "name": name, "description": description, "object": format!("{name}.raw"), "size_bytes": size_bytes,
        "architecture": "x86_64", "platform": "Linux", "root_device_name": "/dev/xvda", "user": user,
        "boot": { "kernel": "cloud.vmlinux", "initrd": "cloud.initrd", "command_line": COMMAND_LINE },
    });
    publish(images, name, &text)
}

/// The manifest appears whole or not at all.
fn publish(images: &Path, name: &str, manifest: &serde_json::Value) -> Result<()> {
    let temporary = images.join(format!("{name}.json.new"));
    fs::write(&temporary, serde_json::to_vec_pretty(manifest)?)?;
    fs::write(images.join(format!("{name}.recipe")), RECIPE)?;
    fs::rename(temporary, images.join(format!("{name}.json")))?;
    Ok(())
}

/// A scratch folder that goes when the image is done.
struct Work {
    path: PathBuf,
    images: PathBuf,
}

impl Work {
    fn new(images: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(images)?;
        let path = images.join(format!("{name}.work"));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(Self { path, images: images.to_owned() })
    }

    /// A tree of Debian packages: unpacked only (`extract`) or configured (`minbase`).
    fn bootstrap(&self, variant: &str, packages: &str) -> Result<PathBuf> {
        let tree = self.path.join("tree");
        let mut command = Command::new("mmdebstrap");
        command.arg(format!("--variant={variant}")).arg(format!("--include={packages}"));
        command.args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\""]);
        command.args(["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]);
        command.args(["--dpkgopt=path-exclude=/usr/share/locale/*"]);
        command.arg(SUITE).arg(&tree);
        run(&mut command)?;
        Ok(tree)
    }

    /// Writes `tree` into the file system of a sparse disk of `size_bytes`.
    fn disk(&self, tree: &Path, name: &str, size_bytes: u64) -> Result<()> {
        let disk = self.path.join("disk.raw");
        fs::File::create(&disk)?.set_len(size_bytes)?;
        let mut command = Command::new("/sbin/mke2fs");
        command.args(["-q", "-t", "ext4", "-L", "cardinal-root", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d"]);
        run(command.arg(tree).arg(&disk))?;
        fs::rename(&disk, self.images.join(format!("{name}.raw")))?;
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Debian's cloud kernel and the initial root, shared by both images.
fn kernel(images: &Path, work: &Work, step: &Step) -> Result<()> {
    let unpacked = work.path.join("kernel");
    step.note("kernel");
    fs::create_dir(&unpacked)?;
    let depends = output(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| anyhow!("linux-image-cloud-amd64 is unknown to apt; run apt-get update"))?;
    run(Command::new("apt-get").args(["-qq", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(&work.path))?;
    let archive = find(&work.path, |name| name.starts_with("linux-image") && name.ends_with(".deb"))?;
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&unpacked))?;
    if images.join("cloud.vmlinux").exists() && images.join("cloud.initrd").exists() {
        return Ok(());
    }

    let image = find(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let temporary = work.path.join("vmlinux");
    fs::write(&temporary, unpack_kernel(&fs::read(image)?)?)?;
    fs::rename(temporary, images.join("cloud.vmlinux"))?;

    let modules = find(&unpacked.join("lib/modules"), |_| true)?.join("kernel");
    let root = work.path.join("initrd");
    for folder in ["bin", "modules"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    executable(&root.join("init"), include_str!("../image/init"))?;
    let mut order = Vec::new();
    for module in MODULES {
        load_order(&modules, &modules.join(format!("{module}.ko")), &mut order)?;
    }
    let mut names = String::new();
    for module in &order {
        let name = file_name(module)?;
        fs::copy(module, root.join("modules").join(&name))?;
        names.push_str(&name);
        names.push('\n');
    }
    fs::write(root.join("modules/order"), names)?;
    let temporary = work.path.join("cloud.initrd");
    let list = output(Command::new("find").arg(".").current_dir(&root))?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc"])
        .current_dir(&root)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&temporary)?)
        .spawn()
        .context("cpio")?;
    cpio.stdin.take().ok_or_else(|| anyhow!("cpio has no input"))?.write_all(list.as_bytes())?;
    if !cpio.wait()?.success() {
        bail!("cpio failed");
    }
    fs::rename(temporary, images.join("cloud.initrd"))?;
    Ok(())
}

/// Appends `module` to `order` after everything that its `depends=` names.
fn load_order(tree: &Path, module: &Path, order: &mut Vec<PathBuf>) -> Result<()> {
    if order.iter().any(|known| known == module) {
        return Ok(());
    }
    let bytes = fs::read(module).with_context(|| format!("kernel module {}", module.display()))?;
    let depends = bytes
        .split(|byte| *byte == 0)
        .find_map(|word| word.strip_prefix(b"depends="))
        .map(|names| String::from_utf8_lossy(names).into_owned())
        .unwrap_or_default();
    for name in depends.split(',').filter(|name| !name.is_empty()) {
        let file = format!("{name}.ko");
        let found = output(Command::new("find").arg(tree).args(["-name", &file]))?;
        let path = found.lines().next().ok_or_else(|| anyhow!("kernel module {file} is not in the package"))?;
        load_order(tree, Path::new(path), order)?;
    }
    order.push(module.to_owned());
    Ok(())
}

/// The ELF kernel inside a bzImage (Linux boot protocol 2.08: the payload's
/// offset and length stand at 248h and 24Ch, counted from the protected-mode
/// code; its last four bytes are the unpacked size).
fn unpack_kernel(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..).and_then(|tail| tail.first_chunk::<4>()).ok_or_else(|| anyhow!("short kernel image"))?;
        Ok(usize::try_from(u32::from_le_bytes(*bytes))?)
    };
    let sectors = usize::from(*image.get(0x1f1).ok_or_else(|| anyhow!("short kernel image"))?);
    let code = (sectors.max(1) + 1) * 512;
    let (offset, length) = (word(0x248)?, word(0x24c)?);
    let payload =
        image.get(code + offset..code + offset + length.saturating_sub(4)).ok_or_else(|| anyhow!("kernel payload leaves the image"))?;
    let tool = match payload.first_chunk::<4>() {
        Some([0x02, 0x21, 0x4c, 0x18]) => "lz4",
        Some([0xfd, b'7', b'z', b'X']) => "xz",
        Some([0x28, 0xb5, 0x2f, 0xfd]) => "zstd",
        other => bail!("kernel payload of unknown compression {other:02x?}"),
    };
    let mut child = Command::new(tool).arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context(tool)?;
    let mut input = child.stdin.take().ok_or_else(|| anyhow!("{tool} has no input"))?;
    let payload = payload.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&payload));
    let output = child.wait_with_output()?;
    let _ = writer.join();
    if !output.status.success() || !output.stdout.starts_with(b"\x7fELF") {
        bail!("{tool} could not unpack the kernel");
    }
    Ok(output.stdout)
}

fn mini_tree(tree: &Path) -> Result<()> {
    for path in
        ["usr/share", "usr/lib/x86_64-linux-gnu/perl", "usr/lib/x86_64-linux-gnu/perl-base", "var/lib/dpkg", "var/cache", "etc/pam.d"]
    {
        let path = tree.join(path);
        if path.exists() {
            fs::remove_dir_all(path)?;
        }
    }
    for path in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "home/ec2-user",
        "var/lib",
        "var/empty",
        "etc/sudoers.d",
        "etc/acpi/PWRF",
        "etc/pam.d",
        "etc/ssl/certs",
    ] {
        fs::create_dir_all(tree.join(path))?;
    }
    let applets = output(Command::new("/bin/busybox").arg("--list"))?;
    for applet in applets.lines() {
        let places = ["bin", "sbin", "usr/bin", "usr/sbin"];
        if !places.iter().any(|place| tree.join(place).join(applet).symlink_metadata().is_ok()) {
            symlink("/bin/busybox", tree.join("bin").join(applet))?;
        }
    }
    // busybox's own shell would run its applets in place of the real programs.
    let _ = fs::remove_file(tree.join("bin/sh"));
    symlink("dash", tree.join("bin/sh"))?;
    // An unconfigured package has not got its capability, which lets users ping.
    fs::set_permissions(tree.join("bin/ping"), fs::Permissions::from_mode(0o4755))?;
    for applet in ["init", "getty", "poweroff", "reboot", "halt"] {
        let path = tree.join("sbin").join(applet);
        let _ = fs::remove_file(&path);
        symlink("/bin/busybox", path)?;
    }
    let scripts = [
        ("etc/rc", include_str!("../image/mini/rc")),
        ("etc/rc.shutdown", include_str!("../image/mini/rc.shutdown")),
        ("etc/console-login", include_str!("../image/mini/console-login")),
        ("etc/udhcpc.script", include_str!("../image/mini/udhcpc.script")),
        ("etc/first-boot", include_str!("../image/mini/first-boot")),
        ("etc/acpi/PWRF/00000080", include_str!("../image/mini/acpi-power")),
    ];
    for (path, text) in scripts {
        executable(&tree.join(path), text)?;
    }
    let permit = "auth sufficient pam_permit.so\naccount sufficient pam_permit.so\nsession sufficient pam_permit.so\n";
    let files = [
        ("etc/inittab", include_str!("../image/mini/inittab")),
        ("etc/ssh/sshd_config", include_str!("../image/mini/sshd_config")),
        ("etc/hostname", "mini\n"),
        ("etc/hosts", "127.0.0.1 localhost\n"),
        ("etc/resolv.conf", ""),
        ("etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"),
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\nec2-user:x:1000:1000::/home/ec2-user:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        ),
        ("etc/group", "root:x:0:\ntty:x:5:\ndisk:x:6:\nsudo:x:27:ec2-user\nec2-user:x:1000:\nnogroup:x:65534:\n"),
        ("etc/shadow", "root:*:19000:0:99999:7:::\nsshd:*:19000::::::\nec2-user:*:19000:0:99999:7:::\n"),
        ("etc/pam.d/sudo", permit),
        ("etc/pam.d/login", permit),
        ("etc/sudoers.d/ec2-user", "ec2-user ALL=(ALL) NOPASSWD:ALL\n"),
    ];
    for (path, text) in files {
        fs::write(tree.join(path), text)?;
    }
    fs::set_permissions(tree.join("etc/shadow"), fs::Permissions::from_mode(0o640))?;
    fs::set_permissions(tree.join("etc/sudoers.d/ec2-user"), fs::Permissions::from_mode(0o440))?;
    for key in ["ssh_host_rsa_key", "ssh_host_ecdsa_key", "ssh_host_ed25519_key"] {
        let _ = fs::remove_file(tree.join("etc/ssh").join(key));
    }
    chown(tree.join("home/ec2-user"), Some(1000), Some(1000)).context("owner of /home/ec2-user")
}

fn debian_tree(tree: &Path, work: &Work) -> Result<()> {
    // The modules of the kernel that boots it, for everything beyond the initial root.
    let modules = find(&work.path.join("kernel/lib/modules"), |_| true)?;
    fs::create_dir_all(tree.join("lib/modules"))?;
    run(Command::new("cp").arg("-a").arg(&modules).arg(tree.join("lib/modules")))?;
    run(Command::new("chroot").arg(tree).args(["depmod", "-a"]).arg(file_name(&modules)?))?;
    let files = [
        ("etc/cloud/cloud.cfg.d/99_cardinal.cfg", include_str!("../image/debian-12/99_cardinal.cfg")),
        ("etc/hostname", "debian\n"),
        ("etc/hosts", "127.0.0.1 localhost\n"),
        ("etc/fstab", "LABEL=cardinal-root / ext4 errors=remount-ro 0 1\n"),
        ("etc/machine-id", ""),
    ];
    for (path, text) in files {
        fs::write(tree.join(path), text)?;
    }
    let _ = fs::remove_file(tree.join("etc/resolv.conf"));
    symlink("/run/systemd/resolve/stub-resolv.conf", tree.join("etc/resolv.conf"))?;
    for unit in ["systemd-networkd", "systemd-resolved", "ssh", "serial-getty@ttyS0"] {
        run(Command::new("systemctl").arg(format!("--root={}", tree.display())).args(["enable", "--quiet", unit]))?;
    }
    for unit in ["systemd-networkd-wait-online", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer"] {
        let _ = Command::new("systemctl").arg(format!("--root={}", tree.display())).args(["disable", "--quiet", unit]).status();
    }
    for key in ["rsa", "ecdsa", "ed25519"] {
        for suffix in ["", ".pub"] {
            let _ = fs::remove_file(tree.join(format!("etc/ssh/ssh_host_{key}_key{suffix}")));
        }
    }
    let _ = fs::remove_dir_all(tree.join("var/lib/apt/lists"));
    fs::create_dir_all(tree.join("var/lib/apt/lists/partial"))?;
    Ok(())
}

fn executable(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().ok_or_else(|| anyhow!("no file name in {}", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

fn find(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            return Ok(entry.path());
        }
    }
    bail!("{} lacks an expected file", folder.display())
}

/// Runs a command; its output is shown only when it fails.
fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
