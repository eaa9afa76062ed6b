//! One daemon of a region: how it starts, and how it is found again.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One process of the region.
pub struct Process {
    /// Such as `card-a-1`.
    pub name: String,
    /// `control`, `card`, `host` or `internet`.
    pub kind: &'static str,
    /// Availability zone; empty where it is of none.
    pub zone: String,
    /// What runs.
    pub binary: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
    /// Where it writes.
    pub log: PathBuf,
    /// The process that the rack started, while it runs.
    pub child: Option<Child>,
}

impl Process {
    /// Starts it.
    pub fn start(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(&self.binary)
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C in the terminal is for the rack, which stops them in order.
            .process_group(0)
            .spawn()
            .with_context(|| self.binary.display().to_string())?;
        self.child = Some(child);
        Ok(())
    }

    /// Says once that the process that the rack started is gone.
    pub fn notice_end(&mut self) {
        if let Some(child) = &mut self.child
            && let Ok(Some(status)) = child.try_wait()
        {
            self.child = None;
            eprintln!("rack: {} ended ({status}); start it again with: {}", self.name, self.restart());
        }
    }

    /// The command line that starts it again.
    pub fn restart(&self) -> String {
        format!("{} --config {} >>{} 2>&1 &", self.binary.display(), self.config.display(), self.log.display())
    }

    /// Its row in the ready file.
    pub fn describe(&self) -> Value {
        json!({
            "name": self.name,
            "kind": self.kind,
            "zone": self.zone,
            "pid": self.child.as_ref().map(Child::id),
            "log": self.log,
            "restart": self.restart(),
        })
    }
}

/// Pids and command lines of the daemons and machines that belong to `dir`.
pub fn of(dir: &Path) -> Vec<(i32, String)> {
    let mark = format!("{}/", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(bytes) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let command = String::from_utf8_lossy(&bytes).replace('\0', " ");
        let program = command.split(' ').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        if matches!(program, "nitro-card" | "thin-hv" | "control" | "internet" | "qemu-system-x86_64") && command.contains(&mark) {
            found.push((pid, command));
        }
    }
    found
}

/// Sends a signal to a process of ours.
pub fn kill(pid: i32, signal: libc::c_int) {
    // SAFETY: kill takes plain integers; the pid was read from /proc as one of ours.
    #[allow(unsafe_code)]
    let _ = unsafe { libc::kill(pid, signal) };
}

/// Waits until no daemon of `dir` runs; machines may.
pub fn wait_gone(dir: &Path, at_most: Duration) {
    let deadline = Instant::now() + at_most;
    while Instant::now() < deadline && of(dir).iter().any(|(_, command)| !command.contains("qemu-system")) {
        std::thread::sleep(Duration::from_millis(20));
    }
}
