//! What the card keeps in the world: servers of machines' functions, volumes,
//! links to kernels. Does the [`Work`] that the core asks for, and nothing else.
//!
//! Work that may take long (copying a kernel, flushing to a volume whose card is
//! away) runs in a thread and reports its end; all else ends at
//! once. Every action is written so that it can be repeated after a crash.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use arc_swap::ArcSwap;
use crossbeam_channel::{Sender, unbounded};
use dataplane::io::vhost::{VhostControl, VhostCounters, VhostPort};
use dataplane::{Dataplane, PortId};
use storage_target::{InitiatorSettings, Target, VolumeSpec};

use crate::attachment::Source;
use crate::console::{Consoles, remove_file};
use crate::converge::Work;
use crate::disk::{DiskCounters, DiskServer};
use crate::instance::{BootSource, initrd_link, kernel_link};
use crate::meters::Meters;
use crate::names::Names;
use crate::object::{Id, Key};
use crate::port::socket_name;
use crate::volume::Spec;

/// Threads for work that ends: copies and volumes.
const WORKERS: usize = 2;
/// Kinds of devices, as metrics name them.
pub const VHOST: &str = "vhost";
/// See [`VHOST`].
pub const DISK: &str = "disk";

type Job = Box<dyn FnOnce() + Send>;

/// The card's hands; one owner.
pub struct Devices {
    parts: Parts,
    ports: HashMap<Id, VhostControl>,
    disks: HashMap<Id, DiskServer>,
    jobs: Sender<Job>,
    report: Report,
}

/// Takes the end of long work.
type Report = Arc<dyn Fn(Key, Result<(), String>) + Send + Sync>;

/// What the hands work with.
#[derive(Clone)]
#[allow(missing_docs)] // the names say it
pub struct Parts {
    pub link_dir: PathBuf,
    pub images_dir: PathBuf,
    pub initiator_nqn: String,
    pub consoles: Arc<Consoles>,
    /// What the packet path's numbers stand for.
    pub names: Arc<ArcSwap<Names>>,
    /// Counters of what is open.
    pub meters: Arc<Meters>,
    /// There with the compute role.
    pub dataplane: Option<Arc<Dataplane>>,
    /// There with the storage role.
    pub target: Option<Arc<Target>>,
}

impl Devices {
    /// Hands that hold nothing yet. `report` is told the end of long work, in whatever thread did it.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn new(parts: Parts, report: impl Fn(Key, Result<(), String>) + Send + Sync + 'static) -> io::Result<Self> {
        let (jobs, queue) = unbounded::<Job>();
        for _ in 0..WORKERS {
            let queue = queue.clone();
            thread::Builder::new().name("device-work".into()).spawn(move || queue.into_iter().for_each(|job| job()))?;
        }
        Ok(Self { parts, ports: HashMap::new(), disks: HashMap::new(), jobs, report: Arc::new(report) })
    }

    /// Does one piece of work. Returns its end, with a message for the operator
    /// if it failed; `None`: it goes on, and its end will be reported.
    pub fn perform(&mut self, key: &Key, work: Work) -> Option<Result<(), String>> {
        let id = &key.id;
        match work {
            Work::PortStart { number, mtu } => Some(self.port_start(id, number, mtu).map_err(text)),
            Work::PortStop { number } => Some(self.port_stop(id, number).map_err(text)),
            Work::DiskStart { source, serial } => Some(self.disk_start(id, source, serial).map_err(text)),
            Work::DiskStop => self.disk_stop(key),
            Work::VolumePut(spec) => self.job(key, move |parts, id| volume_put(parts, id, spec)),
            Work::VolumeDelete => self.job(key, volume_delete),
            Work::InstanceStage(source) => self.job(key, move |parts, id| stage(parts, id, &source)),
            Work::InstanceClean => self.job(key, |parts, id| clean(parts, id).map_err(text)),
        }
    }

    fn port_start(&mut self, id: &Id, number: PortId, mtu: u16) -> io::Result<()> {
        let dataplane = self.parts.dataplane.as_ref().ok_or_else(|| io::Error::other("this card has no packet path"))?;
        let (port, control) = VhostPort::start(self.socket(id), mtu)?;
        dataplane.port_attach(number, Box::new(port));
        let read = control.meter();
        self.parts.meters.put(VHOST, id.as_str(), move || {
            let VhostCounters { connections, malformed, oversize, no_buffer, broken } = read();
            vec![
                ("connections", connections),
                ("malformed", malformed),
                ("oversize", oversize),
                ("no_buffer", no_buffer),
                ("broken", broken),
            ]
        });
        self.ports.insert(id.clone(), control);
        Ok(())
    }

    fn port_stop(&mut self, id: &Id, number: PortId) -> io::Result<()> {
        self.parts.meters.remove(VHOST, id.as_str());
        if let Some(control) = self.ports.remove(id) {
            if let Some(dataplane) = &self.parts.dataplane {
                dataplane.port_detach(number);
            }
            control.stop();
        }
        remove_file(&self.socket(id))
    }

    fn disk_start(&mut self, id: &Id, source: Source, serial: String) -> io::Result<()> {
        let host_nqn = self.parts.initiator_nqn.clone();
        let initiator = InitiatorSettings { address: source.address, subsystem_nqn: source.nqn, host_nqn };
        let server = DiskServer::start(self.socket(id), initiator, serial, source.size_bytes)?;
        let read = server.meter();
        self.parts.meters.put(DISK, id.as_str(), move || {
            let DiskCounters { connections, completed, failed, malformed } = read();
            vec![("connections", connections), ("completed", completed), ("failed", failed), ("malformed", malformed)]
        });
        self.disks.insert(id.clone(), server);
        Ok(())
    }

    fn disk_stop(&mut self, key: &Key) -> Option<Result<(), String>> {
        self.parts.meters.remove(DISK, key.id.as_str());
        let Some(server) = self.disks.remove(&key.id) else {
            return Some(remove_file(&self.socket(&key.id)).map_err(text));
        };
        let (report, stopped, socket) = (self.report.clone(), key.clone(), self.socket(&key.id));
        let stop = move || {
            server.stop();
            report(stopped, remove_file(&socket).map_err(text));
        };
        // It may wait for a volume whose card is away, so it has a thread to itself.
        thread::Builder::new().name("disk-stop".into()).spawn(stop).err().map(|error| Err(text(error)))
    }

    fn job(&self, key: &Key, job: impl FnOnce(&Parts, &Id) -> Result<(), String> + Send + 'static) -> Option<Result<(), String>> {
        let (parts, report, key) = (self.parts.clone(), self.report.clone(), key.clone());
        let job = move || {
            let result = job(&parts, &key.id);
            report(key, result);
        };
        self.jobs.send(Box::new(job)).err().map(|_| Err("no thread is left for this work".into()))
    }

    fn socket(&self, id: &Id) -> PathBuf {
        self.parts.link_dir.join(socket_name(id))
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // All at the same time: each may wait for a volume whose card is away.
        thread::scope(|scope| {
            for (_, server) in self.disks.drain() {
                scope.spawn(move || server.stop());
            }
        });
    }
}

fn volume_put(parts: &Parts, id: &Id, spec: Spec) -> Result<(), String> {
    let target = parts.target.as_ref().ok_or("this card keeps no volumes")?;
    let spec = VolumeSpec {
        id: id.to_string(),
        size_bytes: spec.size_bytes,
        image: spec.image,
        initiator_nqn: spec.initiator_nqn,
        iops: spec.iops,
        throughput_mib_s: spec.throughput_mib_s,
    };
    target.volume_put(spec).map_err(text)
}

fn volume_delete(parts: &Parts, id: &Id) -> Result<(), String> {
    let target = parts.target.as_ref().ok_or("this card keeps no volumes")?;
    target.volume_delete(id.as_str()).map_err(text)
}

fn stage(parts: &Parts, id: &Id, source: &BootSource) -> Result<(), String> {
    parts.consoles.open(id).map_err(text)?;
    for (key, link) in [(&source.kernel, kernel_link(id)), (&source.initrd, initrd_link(id))] {
        let link = parts.link_dir.join(link);
        match key {
            Some(key) => expose(&parts.images_dir.join(key), &link).map_err(|error| format!("image object {key}: {error}"))?,
            None => remove_file(&link).map_err(text)?,
        }
    }
    Ok(())
}

/// Makes an object of the image store appear at `link`: by a hard link, or as a
/// copy where the link folder is on another file system.
fn expose(object: &Path, link: &Path) -> io::Result<()> {
    let beside = link.with_extension("tmp");
    remove_file(&beside)?;
    if let Err(error) = fs::hard_link(object, &beside) {
        if error.kind() == io::ErrorKind::NotFound {
            return Err(error);
        }
        fs::copy(object, &beside)?;
    }
    // Renaming one link of a file over another of the same file changes nothing and leaves both.
    fs::rename(&beside, link)?;
    remove_file(&beside)
}

fn clean(parts: &Parts, id: &Id) -> io::Result<()> {
    remove_file(&parts.link_dir.join(kernel_link(id)))?;
    remove_file(&parts.link_dir.join(initrd_link(id)))?;
    parts.consoles.remove(id)
}

fn text(error: impl std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        source = cause.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(folder: &Path) -> Parts {
        let consoles = Arc::new(Consoles::new(&folder.join("state")).unwrap());
        for name in ["link", "images"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        Parts {
            link_dir: folder.join("link"),
            images_dir: folder.join("images"),
            initiator_nqn: String::new(),
            consoles,
            names: Arc::default(),
            meters: Arc::default(),
            dataplane: None,
            target: None,
        }
    }

    #[test]
    fn a_kernel_is_linked_again_and_again_and_cleaned_away() {
        let folder = tempfile::tempdir().unwrap();
        let parts = parts(folder.path());
        let id = Id::parse("i-1").unwrap();
        let source = BootSource { kernel: Some("mini.vmlinux".into()), initrd: None, command_line: String::new() };
        assert!(stage(&parts, &id, &source).unwrap_err().contains("mini.vmlinux"));
        fs::write(parts.images_dir.join("mini.vmlinux"), b"kernel").unwrap();
        for _ in 0..2 {
            stage(&parts, &id, &source).unwrap();
            assert_eq!(fs::read(parts.link_dir.join("i-1.kernel")).unwrap(), b"kernel");
        }
        assert_eq!(fs::read_dir(&parts.link_dir).unwrap().count(), 1);
        for _ in 0..2 {
            clean(&parts, &id).unwrap();
        }
        assert_eq!(fs::read_dir(&parts.link_dir).unwrap().count(), 0);
        assert!(fs::read_dir(folder.path().join("state/console")).unwrap().next().is_none());
    }
}
