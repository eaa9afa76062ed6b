//! The binary without a cloud: what scripts rely on, and what damaged folders do.
#![allow(clippy::cast_possible_truncation, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod wire;

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use wire::{HOST, OTHER, Outcome, Raw, Sqe, connect_data, connect_sqe};

const BINARY: &str = env!("CARGO_BIN_EXE_storage-target");
const NQN: &str = "nqn.2026-11.cardinal:volume:";

/// A running daemon; killed when dropped.
struct Daemon {
    child: Child,
    address: SocketAddr,
    /// What it printed before `ready`.
    lines: Vec<String>,
}

impl Daemon {
    fn start(dir: &Path, volumes: &[&str]) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut child = serve(dir, address, volumes).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = Vec::new();
        loop {
            match out.next() {
                Some(Ok(line)) if line == "ready" => return Self { child, address, lines },
                Some(Ok(line)) => lines.push(line),
                _ => {
                    let mut error = String::new();
                    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                    panic!("no ready: {error}");
                }
            }
        }
    }

    /// SIGTERM; what it said on standard error.
    fn stop(mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                break;
            }
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut error = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        error
    }

    fn io(&self, name: &str) -> (Raw, Raw) {
        Raw::io(self.address, &format!("{NQN}{name}"), 0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(dir: &Path, address: SocketAddr, volumes: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["serve", "--listen", &address.to_string(), "--dir"]).arg(dir);
    command.args(volumes.iter().flat_map(|volume| ["--volume", volume]));
    command
}

/// Runs a command that has to end by itself.
fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn resize(dir: &Path, volume: &str) -> Output {
    run(Command::new(BINARY).args(["resize", "--volume", volume, "--dir"]).arg(dir))
}

/// It failed, and said why with these words.
fn assert_refused(output: &Output, words: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(words), "{error}");
}

fn write(io: &mut Raw, lba: u64, fill: u8) -> u16 {
    let Outcome::End { status, .. } = io.run(Sqe::new(1, 1).lba(lba, 8).here(0, 4096), &[fill; 4096]) else { panic!() };
    status
}

fn read(io: &mut Raw, lba: u64) -> Result<Vec<u8>, u16> {
    match io.run(Sqe::new(2, 1).lba(lba, 8).there(4096), &[]) {
        Outcome::End { status: 0, data, .. } => Ok(data),
        Outcome::End { status, .. } => Err(status),
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn volumes_keep_their_names_and_their_data_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &["beta=8M,type=gp3", "alpha=16M", "memory=8M,ram"]);
    assert_eq!(daemon.lines, ["alpha", "beta", "memory"].map(|name| format!("{name} {NQN}{name}")));
    for (name, fill) in [("alpha", 1), ("beta", 2), ("memory", 3)] {
        let (_admin, mut io) = daemon.io(name);
        assert_eq!(write(&mut io, 8, fill), 0);
        assert_eq!(read(&mut io, 8), Ok(vec![fill; 4096]));
    }
    daemon.stop();
    // One is named again and larger, one is new, and one is in the folder only. Memory is gone.
    let daemon = Daemon::start(dir.path(), &["beta=12M", "gamma=1M"]);
    assert_eq!(daemon.lines, ["alpha", "beta", "gamma"].map(|name| format!("{name} {NQN}{name}")));
    for (name, fill) in [("alpha", 1), ("beta", 2)] {
        let (_admin, mut io) = daemon.io(name);
        assert_eq!(read(&mut io, 8), Ok(vec![fill; 4096]), "{name}");
    }
    let (_admin, mut io) = daemon.io("beta");
    assert_eq!(write(&mut io, (12 << 11) - 8, 4), 0, "the last blocks of the larger size");
    daemon.stop();
    let smaller = run(&mut serve(dir.path(), "127.0.0.1:0".parse().unwrap(), &["beta=8M"]));
    assert_refused(&smaller, "cannot shrink");
    assert!(smaller.stdout.is_empty());
}

#[test]
fn a_resize_reaches_connected_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &["data=8M", "memory=8M,ram"]);
    for name in ["data", "memory"] {
        let (mut admin, mut io) = daemon.io(name);
        assert!(matches!(admin.run(Sqe::new(9, 0).dword(10, 0x0b).dword(11, 0x100), &[]), Outcome::End { status: 0, .. }));
        admin.send_pdu(&wire::capsule(Sqe::new(0x0c, 0), &[]));
        assert_eq!(write(&mut io, 8 << 11, 1), 0x080, "LBA out of range");
        let output = resize(dir.path(), &format!("{name}=16M"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(matches!(admin.outcome(), Outcome::End { status: 0, dw0: 0x0004_0002, .. }));
        assert_eq!(write(&mut io, 8 << 11, 1), 0);
        assert_refused(&resize(dir.path(), &format!("{name}=8M")), "cannot shrink");
    }
    assert_refused(&resize(dir.path(), "none=8M"), "no volume none");
    daemon.stop();
    assert_refused(&resize(dir.path(), "data=32M"), "no daemon serves");
}

#[test]
fn hosts_that_are_not_allowed_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &[&format!("data=8M,ram,allow={OTHER}"), "open=8M,ram"]);
    for (volume, host, expected) in [("data", HOST, 0x184), ("data", OTHER, 0), ("open", HOST, 0), ("open", OTHER, 0)] {
        let mut raw = Raw::ready(daemon.address, 0);
        let outcome = raw.run(connect_sqe(0, 31, 0), &connect_data(0xffff, &format!("{NQN}{volume}"), host));
        let Outcome::End { status, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(status, expected, "{volume} for {host}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &["data=8M"]);
    let second = run(&mut serve(dir.path(), "127.0.0.1:0".parse().unwrap(), &[]));
    assert_refused(&second, "another process serves the volumes");
    let elsewhere = tempfile::tempdir().unwrap();
    let taken = run(&mut serve(elsewhere.path(), daemon.address, &[]));
    assert_refused(&taken, &daemon.address.to_string());
    let any = || "127.0.0.1:0".parse().unwrap();
    assert_refused(&run(serve(elsewhere.path(), any(), &[]).args(["--backend", "spdk"])), "no SPDK");
    for (volume, words) in [
        ("a/b=8M", "letters, digits and dashes"),
        ("data=8", "multiple of 512"),
        ("data=100T", "at most 64 TiB"),
        ("data=8M,type=gp3,iops=1", "3000 to 80000"),
        ("data=8M,type=zip", "gp2, gp3"),
    ] {
        assert_refused(&run(&mut serve(elsewhere.path(), any(), &[volume])), words);
    }
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert_refused(&run(&mut serve(&file, any(), &[])), "Not a directory");
    // The first one never noticed.
    assert_eq!(write(&mut daemon.io("data").1, 0, 1), 0);
}

#[test]
fn a_damaged_volume_is_named_and_all_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    Daemon::start(dir.path(), &["cut=8M", "fine=8M", "foreign=8M", "pipe=8M", "other=8M", "old=8M"]).stop();
    let at = |name: &str| dir.path().join("volumes").join(name);
    std::fs::OpenOptions::new().write(true).open(at("cut/data")).unwrap().set_len(4 << 20).unwrap();
    std::fs::write(at("foreign/volume.json"), b"\x7fELF").unwrap();
    std::fs::remove_file(at("pipe/data")).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe/data")).status().unwrap().success());
    std::fs::copy(at("fine/volume.json"), at("other/volume.json")).unwrap();
    std::fs::write(
        at("old/volume.json"),
        r#"{"version":9,"spec":{"id":"old","size_bytes":8388608,"image":null,"initiator_nqn":null,"iops":0,"throughput_mib_s":0}}"#,
    )
    .unwrap();
    std::fs::write(at("stray"), "").unwrap();
    let daemon = Daemon::start(dir.path(), &[]);
    assert_eq!(daemon.lines, [format!("fine {NQN}fine")]);
    let (_admin, mut io) = daemon.io("fine");
    assert_eq!(write(&mut io, 0, 1), 0);
    // Truncated while it is served: never zeros, always an error.
    std::fs::OpenOptions::new().write(true).open(at("fine/data")).unwrap().set_len(4 << 20).unwrap();
    assert_eq!(read(&mut io, 0), Ok(vec![1; 4096]));
    assert_eq!(read(&mut io, 6 << 11), Err(0x281));
    let said = daemon.stop();
    for (name, words) in [
        ("cut", "is no file of 8388608 bytes but has 4194304"),
        ("foreign", "volume.json"),
        ("pipe", "is no file"),
        ("other", "belongs to volume fine"),
        ("old", "has version 9"),
        ("stray", "volume.json"),
    ] {
        let named = |line: &&str| line.contains("not served") && line.contains(words);
        assert!(said.lines().any(|line| named(&line)), "{name}: {said}");
    }
}

#[test]
fn ten_thousand_connections_of_garbage_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &["data=8M"]);
    let (_admin, mut io) = daemon.io("data");
    let mut chance = 0x1234_5678_9abc_def1_u64;
    for round in 0..10_000_u32 {
        let bytes: Vec<u8> = (0..1 + round % 200)
            .map(|_| {
                chance ^= chance << 13;
                chance ^= chance >> 7;
                chance ^= chance << 17;
                (chance >> 32) as u8
            })
            .collect();
        let Ok(mut stream) = std::net::TcpStream::connect(daemon.address) else { continue };
        let _ = std::io::Write::write_all(&mut stream, &bytes);
        if round % 100 == 0 {
            assert_eq!(write(&mut io, u64::from(round % 1000), round as u8), 0);
        }
    }
    // A newcomer gets in as well.
    assert_eq!(read(&mut daemon.io("data").1, 0).map(|data| data.len()), Ok(4096));
}
