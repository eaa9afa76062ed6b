//! qemu-storage-daemon: an NBD server over a file in memory, started for one run and ended with it.
//!
//! Without an iothread: the daemon of Debian 12 aborts with one when its first client leaves.

use super::nbd::Export;
use anyhow::{Context as _, Result, bail};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The daemon.
pub struct Daemon {
    child: Child,
    address: SocketAddr,
    /// Its volume; goes with it.
    file: std::path::PathBuf,
}

impl Daemon {
    /// Starts it with a volume of `size` bytes.
    pub fn start(size: u64, core: Option<u32>) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let file = std::path::PathBuf::from(format!("/dev/shm/perf-blocks-{}", std::process::id()));
        std::fs::File::create(&file).and_then(|made| made.set_len(size)).with_context(|| file.display().to_string())?;
        let mut command = match core {
            Some(core) => {
                let mut command = Command::new("taskset");
                command.args(["-c", &core.to_string(), "qemu-storage-daemon"]);
                command
            }
            None => Command::new("qemu-storage-daemon"),
        };
        let port = address.port();
        command
            .args(["--blockdev", &format!("driver=file,filename={},node-name=disk,aio=threads", file.display())])
            .args(["--nbd-server", &format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=0")])
            .args(["--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command.spawn();
        if child.is_err() {
            let _ = std::fs::remove_file(&file);
        }
        let mut daemon = Self { child: child.context("qemu-storage-daemon")?, address, file };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(address).is_err() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("qemu-storage-daemon ends with {status}");
            }
            if Instant::now() > deadline {
                bail!("qemu-storage-daemon does not listen");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// A connection to its volume.
    pub fn connect(&self) -> Result<Export> {
        Export::connect(self.address, "disk")
    }

    /// Its process: taskset has become it.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}
