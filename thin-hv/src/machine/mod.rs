//! One guest, whatever runs it.
//!
//! A [`Machine`] obeys at once and reports later: every method only asks, and
//! what came of it arrives as an [`Event`]. Two implementations pass the same
//! tests (`tests/conformance.rs`): [`qemu`] and [`sim`].
//!
//! ```text
//!   start, adopt -> .. -> Ready -> (Console | Reset | Plugged | Unplugged | PlugFailed)* -> Exited
//!                                    PoweredOff: the guest is off, its machine is still there;
//!                                    `reset` starts it again, `kill` ends it
//! ```

mod command_line;
pub mod qemu;
mod qmp;
pub mod sim;
mod watch;

use card_proto::host;
use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;

/// Functions that one machine can have at a time.
pub const FUNCTIONS_MAX: usize = 26;

/// What can run guests.
pub trait Vmm: Send {
    /// `qemu` or `sim`, as the card shows it.
    fn name(&self) -> &'static str;

    /// Starts a machine with all functions of its spec.
    ///
    /// # Errors
    /// What kept it from starting; nothing of it is left then.
    fn start(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Box<dyn Machine>>;

    /// Takes over the machine that an earlier agent started by the same
    /// launch; `None` when it has ended.
    ///
    /// # Errors
    /// It runs and cannot be reached.
    fn adopt(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Option<Box<dyn Machine>>>;
}

/// One guest.
pub trait Machine: Send {
    /// Presses the power button: the guest may shut down, now or never.
    fn power_button(&mut self);
    /// Starts the guest anew in the same machine, also one that is off.
    fn reset(&mut self);
    /// Adds a function while the guest runs.
    fn plug(&mut self, function: &Function);
    /// Asks the guest to let go of a function.
    fn unplug(&mut self, id: &str);
    /// Ends the machine now.
    fn kill(&mut self);
    /// Types bytes on the serial console.
    fn console_input(&mut self, bytes: &[u8]);
    /// Takes console output, at most `limit` bytes; empty when there is none.
    fn console_output(&mut self, limit: usize) -> Vec<u8>;
}

/// What a machine is started with.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// What it shall be.
    pub spec: &'a Spec,
    /// Cores from the ledger, one per vCPU.
    pub cores: &'a [u32],
    /// Its folder, which exists and belongs to it alone.
    pub folder: &'a Path,
    /// Functions plugged when the earlier agent wrote it down; for `adopt` only.
    pub plugged: &'a BTreeSet<String>,
}

/// What happened in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest runs; these functions are plugged.
    Ready(BTreeSet<String>),
    /// There is console output to take.
    Console,
    /// The guest turned itself off.
    PoweredOff,
    /// The guest starts anew, by `reset` or by itself.
    Reset,
    /// A function is there.
    Plugged(String),
    /// A function is gone.
    Unplugged(String),
    /// A function could not be plugged.
    PlugFailed {
        /// Which one.
        function: String,
        /// Why.
        message: String,
    },
    /// The machine is gone, and how its process ended.
    Exited(String),
}

/// Whose event it is: a machine's id and which run of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The machine's id.
    pub id: String,
    /// Counts the runs that this agent has seen, so that a late event of an
    /// earlier run is recognised.
    pub run: u64,
}

/// Where one run of a machine reports to.
#[derive(Clone, Debug)]
pub struct Events {
    source: Source,
    sink: mpsc::Sender<(Source, Event)>,
}

impl Events {
    /// Reports as `source` into `sink`.
    #[must_use]
    pub fn new(source: Source, sink: mpsc::Sender<(Source, Event)>) -> Self {
        Self { source, sink }
    }

    fn send(&self, event: Event) {
        // Nobody listens while the agent ends, and nobody needs to.
        let _ = self.sink.send((self.source.clone(), event));
    }
}

/// What a machine shall be, checked: what the card says becomes this once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Letters, digits, `-`, `_` and `.`, at most 64, first a letter.
    pub id: String,
    /// At least 1.
    pub vcpus: u32,
    /// At least one page.
    pub memory_bytes: u64,
    /// What the guest reads about its vendor.
    pub smbios: host::Smbios,
    /// How it boots.
    pub boot: Boot,
    /// Its PCI functions, with distinct ids.
    pub functions: Vec<Function>,
}

/// How a machine boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// From its boot disk, by firmware.
    Firmware,
    /// Directly.
    Kernel {
        /// A bzImage, or an ELF vmlinux with a PVH note.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// Given to the kernel as it is.
        command_line: String,
    },
}

/// A PCI function of the card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Stable while it is plugged.
    pub id: String,
    /// Its vhost-user socket: the machine binds it, the card connects.
    pub socket: PathBuf,
    /// What it is.
    pub kind: FunctionKind,
}

/// The kinds of function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionKind {
    /// A network card; MTU 0: not told to the guest by the device.
    Net {
        /// Of the guest's side.
        mac: [u8; 6],
        /// Largest IP packet.
        mtu: u16,
    },
    /// A disk.
    Block {
        /// The firmware boots from it.
        boot: bool,
    },
}

/// A field of a card's message that breaks a rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {field}: {rule}")]
pub struct Invalid {
    /// Which field.
    pub field: &'static str,
    /// What it has to be.
    pub rule: &'static str,
}

/// An id that can name a folder, a process and a device.
///
/// # Errors
/// [`Invalid`] when it cannot.
pub fn check_id(field: &'static str, id: &str) -> Result<(), Invalid> {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if id.len() <= 64 && id.starts_with(|first: char| first.is_ascii_alphabetic()) && id.bytes().all(letters) {
        return Ok(());
    }
    Err(Invalid { field, rule: "is 1 to 64 of A-Z a-z 0-9 - _ . and begins with a letter" })
}

impl Spec {
    /// Checks what the card says; paths are taken inside `link_dir`.
    ///
    /// # Errors
    /// [`Invalid`] with the first field that breaks a rule.
    pub fn new(machine: &host::Machine, link_dir: &Path) -> Result<Self, Invalid> {
        check_id("id", &machine.id)?;
        if machine.vcpus == 0 || 255 < machine.vcpus {
            return Err(Invalid { field: "vcpus", rule: "is 1 to 255" });
        }
        if machine.memory_bytes < crate::partition::PAGE_BYTES || 1 << 46 < machine.memory_bytes {
            return Err(Invalid { field: "memory_bytes", rule: "is 2 MiB to 64 TiB" });
        }
        let smbios = machine.smbios.clone().unwrap_or_default();
        if !smbios.uuid.is_empty() && !is_uuid(&smbios.uuid) {
            return Err(Invalid { field: "smbios.uuid", rule: "is 8-4-4-4-12 hexadecimal digits" });
        }
        let texts = [&smbios.vendor, &smbios.product, &smbios.serial, &smbios.asset_tag];
        if texts.iter().any(|text| 64 < text.len() || text.contains(|letter: char| letter.is_control())) {
            return Err(Invalid { field: "smbios", rule: "has texts of at most 64 printable bytes" });
        }
        if machine.command_line.contains('\0') || 2047 < machine.command_line.len() {
            return Err(Invalid { field: "command_line", rule: "is at most 2047 bytes without NUL" });
        }
        let optional = |field, path: &str| if path.is_empty() { Ok(None) } else { inside(field, link_dir, path).map(Some) };
        let boot = match optional("kernel", &machine.kernel)? {
            None => Boot::Firmware,
            Some(kernel) => {
                Boot::Kernel { kernel, initrd: optional("initrd", &machine.initrd)?, command_line: machine.command_line.clone() }
            }
        };
        let functions = machine.functions.iter().map(|function| Function::new(function, link_dir)).collect::<Result<Vec<_>, _>>()?;
        let distinct: BTreeSet<&str> = functions.iter().map(|function| function.id.as_str()).collect();
        if distinct.len() != functions.len() {
            return Err(Invalid { field: "functions", rule: "have distinct ids" });
        }
        if FUNCTIONS_MAX < functions.len() {
            return Err(Invalid { field: "functions", rule: "are at most 26" });
        }
        Ok(Self { id: machine.id.clone(), vcpus: machine.vcpus, memory_bytes: machine.memory_bytes, smbios, boot, functions })
    }
}

impl Function {
    fn new(function: &host::Function, link_dir: &Path) -> Result<Self, Invalid> {
        use host::function::Kind;
        check_id("functions.id", &function.id)?;
        let kind = match &function.kind {
            Some(Kind::Net(net)) => {
                let mac = net.mac.as_slice().try_into().map_err(|_| Invalid { field: "functions.mac", rule: "is 6 bytes" })?;
                let mtu = u16::try_from(net.mtu).ok().filter(|mtu| *mtu == 0 || 68 <= *mtu);
                FunctionKind::Net { mac, mtu: mtu.ok_or(Invalid { field: "functions.mtu", rule: "is 0 or 68 to 65535" })? }
            }
            Some(Kind::Block(block)) => FunctionKind::Block { boot: block.boot },
            None => return Err(Invalid { field: "functions.kind", rule: "is net or block" }),
        };
        Ok(Self { id: function.id.clone(), socket: inside("functions.socket", link_dir, &function.socket)?, kind })
    }
}

/// `path`, which is relative to `folder` or lies in it, and climbs nowhere.
fn inside(field: &'static str, folder: &Path, path: &str) -> Result<PathBuf, Invalid> {
    let full = folder.join(path);
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::RootDir | Component::CurDir));
    if path.is_empty() || path.contains('\0') || !plain || !full.starts_with(folder) {
        return Err(Invalid { field, rule: "is a path inside the link folder" });
    }
    Ok(full)
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> host::Machine {
        host::Machine {
            id: "i-1".into(),
            vcpus: 2,
            memory_bytes: 1 << 30,
            kernel: "k".into(),
            functions: vec![host::Function {
                id: "eni-1".into(),
                socket: "/link/eni-1.sock".into(),
                kind: Some(host::function::Kind::Net(host::Net { mac: vec![2, 0, 0, 0, 0, 1], mtu: 9001 })),
            }],
            ..Default::default()
        }
    }

    #[test]
    fn paths_are_relative_to_the_link_or_inside_it() {
        let spec = Spec::new(&message(), Path::new("/link")).unwrap();
        assert_eq!(spec.functions[0].socket, Path::new("/link/eni-1.sock"));
        assert!(matches!(spec.boot, Boot::Kernel { kernel, .. } if kernel == Path::new("/link/k")));
    }

    #[test]
    fn each_broken_rule_names_its_field() {
        let check = |field: &str, change: &dyn Fn(&mut host::Machine)| {
            let mut machine = message();
            change(&mut machine);
            assert_eq!(Spec::new(&machine, Path::new("/link")).unwrap_err().field, field);
        };
        for id in ["", "../x", "1", ".", "a/b", "a b", "a,b", &"a".repeat(65)] {
            check("id", &|machine| machine.id = id.into());
            check("functions.id", &|machine| machine.functions[0].id = id.into());
        }
        check("vcpus", &|machine| machine.vcpus = 0);
        check("memory_bytes", &|machine| machine.memory_bytes = 4096);
        check("memory_bytes", &|machine| machine.memory_bytes = u64::MAX);
        for path in ["../k", "/etc/passwd", "/link/../k", "a\0b"] {
            check("kernel", &|machine| machine.kernel = path.into());
            check("functions.socket", &|machine| machine.functions[0].socket = path.into());
        }
        check("initrd", &|machine| machine.initrd = "/x".into());
        check("command_line", &|machine| machine.command_line = "x".repeat(2048));
        check("functions.mac", &|machine| {
            machine.functions[0].kind = Some(host::function::Kind::Net(host::Net { mac: vec![1; 5], mtu: 0 }));
        });
        check("functions.kind", &|machine| machine.functions[0].kind = None);
        check("functions", &|machine| machine.functions.push(machine.functions[0].clone()));
        check("smbios.uuid", &|machine| machine.smbios = Some(host::Smbios { uuid: "ec2".into(), ..Default::default() }));
        check("smbios", &|machine| machine.smbios = Some(host::Smbios { vendor: "a\nb".into(), ..Default::default() }));
    }
}
