//! Opening a device inside a named network namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Runs `open` inside the network namespace at `path`, on a thread that ends with
/// it, so that this process stays where it is. What it opens stays in there.
/// Without a path, runs it right here.
///
/// # Errors
/// When the namespace cannot be opened or entered, and whatever `open` fails with.
pub(super) fn within<T: Send>(path: Option<&Path>, open: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let Some(path) = path else { return open() };
    let namespace =
        File::open(path).map_err(|error| io::Error::new(error.kind(), format!("network namespace {}: {error}", path.display())))?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            open()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the opening thread died")))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// An empty network namespace, which ends with the last interest in it.
    pub(crate) struct Namespace {
        file: File,
    }

    impl Namespace {
        /// `None`, with the reason printed, where namespaces cannot be made.
        #[allow(unsafe_code)]
        pub(crate) fn new() -> Option<Self> {
            let made = thread::spawn(|| {
                // SAFETY: moves only this thread, which owns nothing that knows a network.
                if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                    return Err(io::Error::last_os_error());
                }
                File::open("/proc/thread-self/ns/net")
            });
            match made.join().unwrap() {
                Ok(file) => {
                    let namespace = Self { file };
                    namespace.ip("link set lo up");
                    // So that nothing but a test's own frames is on a wire; without IPv6
                    // in the kernel there is nothing to write.
                    let _ = namespace.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"));
                    Some(namespace)
                }
                Err(error) => {
                    println!("skipped: no network namespace can be made here: {error}");
                    None
                }
            }
        }

        pub(crate) fn path(&self) -> PathBuf {
            PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
        }

        pub(crate) fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
            within(Some(&self.path()), || Ok(action())).unwrap()
        }

        /// Runs `ip` with these arguments.
        pub(crate) fn ip(&self, arguments: &str) {
            let output = self.run(|| Command::new("ip").args(arguments.split(' ')).output().unwrap());
            assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn what_is_opened_inside_stays_inside() {
        let Some(namespace) = Namespace::new() else { return };
        namespace.ip("link add inside type veth peer name other");
        let index = |name: &str| rustix::fs::access(format!("/proc/thread-self/net/dev_snmp6/{name}"), rustix::fs::Access::EXISTS);
        assert!(namespace.run(|| index("inside")).is_ok());
        assert!(index("inside").is_err());
        assert!(within(Some(Path::new("/nowhere")), || Ok(())).is_err());
    }
}
