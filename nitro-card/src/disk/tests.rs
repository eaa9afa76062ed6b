//! A vhost-user frontend in this process, and a true target.

use super::*;
use storage_target::{Target, TargetSettings, VolumeSpec, volume_nqn};

const HOST: &str = "nqn.2026-11.cardinal:card:card-a";
const ID: &str = "vol-0123456789abcdef0";
const SIZE: u64 = 256 << 20;

/// Not a test: a disk server and its target in a process of their own, for trials with a real guest.
/// `DISK_PROCESS` is what to run (target or disk), a folder, and the target's port.
#[test]
fn process() {
    let Ok(text) = std::env::var("DISK_PROCESS") else { return };
    let mut words = text.split_whitespace();
    let (what, dir) = (words.next().unwrap(), PathBuf::from(words.next().unwrap()));
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], words.next().unwrap().parse().unwrap()));
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let mut keep: (Option<Target>, Option<DiskServer>) = (None, None);
    if what == "target" {
        let settings = TargetSettings { listen: address, dir: dir.join("storage"), images: dir.join("images") };
        let target = Target::start(settings).unwrap();
        let spec = VolumeSpec {
            id: ID.into(),
            size_bytes: SIZE,
            image: words.next().map(Into::into),
            initiator_nqn: Some(HOST.into()),
            ..VolumeSpec::default()
        };
        target.volume_put(spec).unwrap();
        keep.0 = Some(target);
    } else {
        let settings = InitiatorSettings { address, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
        keep.1 = Some(DiskServer::start(dir.join("disk.sock"), settings, ID.replace('-', ""), SIZE).unwrap());
    }
    eprintln!("{what} runs");
    loop {
        std::thread::park();
    }
}
