//! An Ethernet device of DPDK: the network card of a production server, and any
//! of DPDK's virtual devices.
//!
//! The environment layer (EAL) is started once per process, on a thread of its
//! own that may run on every CPU of this process: no thread is pinned and none
//! spins. Devices are plugged in one by one afterwards, so that each can be opened
//! inside another network namespace.
//!
//! A frame is copied between an mbuf and a [`Packet`]; an mbuf holds the largest
//! frame in one segment. Ownership of mbufs: `rx_burst` gives each to us and we
//! free it; `tx_burst` takes those it accepts, and we free the rest.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::{BURST, PacketIo, namespace, packet};
use crate::packet::{FRAME_MAX, Packet, Pool};

/// Arguments of the EAL for a machine without a card that DPDK drives: ordinary
/// pages, no look at the PCI bus, no file and no socket left anywhere.
pub const SOFTWARE: &[&str] = &["--no-huge", "-m", "64", "--no-pci", "--no-telemetry", "--no-shconf", "--log-level=*:warning"];

/// Descriptors of each ring; a device may have its own idea.
const DESCRIPTORS: u16 = 256;
/// Bytes of one frame of a packet socket's ring: [`FRAME_MAX`] and its headers,
/// and such that two make whole pages.
const RING_FRAME: usize = 10_240;
/// Room for data in an mbuf; the driver of packet sockets wants a ring frame's.
const MBUF_ROOM: usize = RING_FRAME;
/// Ethernet header and checksum, and two VLAN tags: what an MTU does not count.
const FRAME_OVERHEAD: usize = 26;
const ANY_SOCKET: u32 = u32::MAX; // SOCKET_ID_ANY

/// One queue pair of an Ethernet device.
pub struct DpdkPort {
    port: u16,
    /// `None` only while the port is dropped.
    device: Option<Device>,
    pool: NonNull<dpdk_sys::rte_mempool>,
    mac: [u8; 6],
    wait: Option<OwnedFd>,
    counters: Arc<DpdkCounters>,
}

// SAFETY: what the pointers lead to belongs to this port alone, and DPDK lets any
// one thread at a time use a port's queue.
unsafe impl Send for DpdkPort {}

/// Frames that were refused, since the port was opened.
#[derive(Debug, Default)]
pub struct DpdkCounters {
    /// Received with a VLAN tag.
    pub tagged: AtomicU64,
    /// Received in several segments, or longer than the largest frame.
    pub oversize: AtomicU64,
    /// Not sent for want of an mbuf.
    pub no_mbuf: AtomicU64,
}

/// Control calls of DPDK come from one thread at a time.
static CONTROL: Mutex<()> = Mutex::new(());

/// Starts the EAL with these arguments, which follow the program's name. Without
/// this call the first port starts it with [`SOFTWARE`].
///
/// # Errors
/// When the EAL refuses the arguments, or was started before.
pub fn start(arguments: &[&str]) -> io::Result<()> {
    let mut first = false;
    let started = eal(arguments, &mut first);
    if first { started } else { Err(io::Error::new(io::ErrorKind::AlreadyExists, "the EAL runs already")) }
}

fn eal(arguments: &[&str], first: &mut bool) -> io::Result<()> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        *first = true;
        thread::scope(|scope| {
            let main = scope.spawn(|| eal_init(arguments));
            main.join().unwrap_or_else(|_| Err(io::Error::other("its thread died")))
        })
        .map_err(|error| error.to_string())
    });
    started.clone().map_err(|error| io::Error::other(format!("DPDK's environment layer: {error}")))
}

/// Becomes the main lcore, which is allowed on all CPUs of this process.
fn eal_init(arguments: &[&str]) -> io::Result<()> {
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let cpus: Vec<_> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).map(|cpu| cpu.to_string()).collect();
    let lcores = format!("--lcores=0@({})", cpus.join(","));
    let prefix = format!("--file-prefix=cardinal-{}", std::process::id());
    let words = ["cardinal", &lcores, &prefix].into_iter().chain(arguments.iter().copied());
    let mut argv = words.map(|word| CString::new(word).map(CString::into_raw)).collect::<Result<Vec<_>, _>>()?;
    let argc = c_int::try_from(argv.len()).map_err(io::Error::other)?;
    argv.push(ptr::null_mut());
    // The EAL keeps pointers into its arguments: they are never freed.
    let argv = argv.leak();
    // SAFETY: `argv` is an array of `argc` strings and a null that live for ever,
    // and `STARTED` lets one thread come here once in a process.
    check(unsafe { dpdk_sys::rte_eal_init(argc, argv.as_mut_ptr()) })?;
    // SAFETY: the EAL runs.
    let directory = unsafe { dpdk_sys::rte_eal_get_runtime_dir() };
    // SAFETY: a string that the EAL keeps for ever.
    let directory = unsafe { CStr::from_ptr(directory) };
    // Empty without hugepages; with them it is not, and stays.
    let _ = std::fs::remove_dir(directory.to_string_lossy().as_ref());
    Ok(())
}

impl DpdkPort {
    /// Opens an interface of the kernel by DPDK's packet socket driver, inside the
    /// network namespace at `netns` when one is given.
    ///
    /// The driver knows nothing of work that senders leave to the card: whoever is at
    /// the other end of a virtual wire has to send whole frames, as another port does.
    ///
    /// # Errors
    /// As [`DpdkPort::open`].
    pub fn open_interface(interface: &str, netns: Option<&Path>) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::open(
            &format!(
                "net_af_packet_card{number},iface={interface},qpairs=1,framesz={RING_FRAME},blocksz={},framecnt={DESCRIPTORS}",
                2 * RING_FRAME
            ),
            netns,
        )
    }

    /// Plugs in the device that `devargs` names as DPDK's command line does: a
    /// virtual device with its arguments, or the address of a card.
    ///
    /// # Errors
    /// When the EAL does not start, or the device is not there, is taken, or does
    /// not come up with one queue pair.
    pub fn open(devargs: &str, netns: Option<&Path>) -> io::Result<Self> {
        eal(SOFTWARE, &mut false)?;
        let _control = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        namespace::within(netns, || Self::open_here(devargs))
            .map_err(|error| io::Error::new(error.kind(), format!("DPDK device {devargs}: {error}")))
    }

    fn open_here(devargs: &str) -> io::Result<Self> {
        let name = devargs.split(',').next().unwrap_or_default();
        let (name, devargs) = (CString::new(name)?, CString::new(devargs)?);
        let before = packet_sockets()?;
        // SAFETY: a string that outlives the call; the EAL runs and `CONTROL` is held.
        check(unsafe { dpdk_sys::rte_dev_probe(devargs.as_ptr()) })?;
        let wait = wait_descriptor(&before);
        let mut port = 0;
        // SAFETY: a string and a place for the number, both outliving the call.
        check(unsafe { dpdk_sys::rte_eth_dev_get_port_by_name(name.as_ptr(), &raw mut port) })?;
        let mut info = dpdk_sys::rte_eth_dev_info::default();
        // SAFETY: the port exists since the probe, and `info` is a place for its answer.
        check(unsafe { dpdk_sys::rte_eth_dev_info_get(port, &raw mut info) })?;
        // From here on an early return unplugs the device.
        let mut device = Device { port, device: info.device, pool: None };

        let (mut rx_count, mut tx_count) = (DESCRIPTORS, DESCRIPTORS);
        // SAFETY: the port exists, and both numbers are places to change them in.
        check(unsafe { dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(port, &raw mut rx_count, &raw mut tx_count) })?;
        let mut settings = dpdk_sys::rte_eth_conf::default();
        let longest = usize::try_from(info.max_rx_pktlen).unwrap_or(0).min(FRAME_MAX);
        let mtu = u16::try_from(longest.saturating_sub(FRAME_OVERHEAD)).unwrap_or(0).min(info.max_mtu);
        settings.rxmode.mtu = u32::from(mtu);
        // SAFETY: the port exists and is stopped; DPDK copies the settings.
        check(unsafe { dpdk_sys::rte_eth_dev_configure(port, 1, 1, &raw const settings) })?;
        // All descriptors of both rings, and a burst under way in each direction.
        let mbufs = u32::from(rx_count) + u32::from(tx_count) + 2 * u32::from(BURST_COUNT);
        let pool = device.pool.insert(Mempool::new(port, mbufs)?).0;
        // SAFETY: queue 0 of a configured port; `device` keeps the pool longer.
        check(unsafe { dpdk_sys::rte_eth_rx_queue_setup(port, 0, rx_count, ANY_SOCKET, ptr::null(), pool.as_ptr()) })?;
        // SAFETY: queue 0 of a configured port.
        check(unsafe { dpdk_sys::rte_eth_tx_queue_setup(port, 0, tx_count, ANY_SOCKET, ptr::null()) })?;
        // SAFETY: both queues are set up.
        check(unsafe { dpdk_sys::rte_eth_dev_start(port) })?;
        // A device that cannot do it says so and has no filter of addresses either.
        // SAFETY: the port is started.
        let _ = unsafe { dpdk_sys::rte_eth_promiscuous_enable(port) };
        let mut address = dpdk_sys::rte_ether_addr::default();
        // SAFETY: the port exists, and `address` is a place for its answer.
        check(unsafe { dpdk_sys::rte_eth_macaddr_get(port, &raw mut address) })?;
        Ok(Self { port, device: Some(device), pool, mac: address.addr_bytes, wait, counters: Arc::default() })
    }

    /// The device's own address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// What was refused; stays valid when the port has moved into a worker.
    #[must_use]
    pub fn counters(&self) -> Arc<DpdkCounters> {
        Arc::clone(&self.counters)
    }

    /// A frame in an mbuf, or `None` when the pool is empty.
    fn fill(&self, frame: &[u8]) -> Option<NonNull<dpdk_sys::rte_mbuf>> {
        // SAFETY: `device` keeps the pool; allocation is safe from any thread.
        let mbuf = NonNull::new(unsafe { dpdk_sys::shim_mbuf_alloc(self.pool.as_ptr()) })?;
        let len = u16::try_from(frame.len()).ok()?;
        // SAFETY: a fresh mbuf of one segment, ours alone.
        let room = unsafe { dpdk_sys::shim_mbuf_append(mbuf.as_ptr(), len) };
        if room.is_null() {
            free(mbuf.as_ptr());
            return None;
        }
        // SAFETY: `append` made exactly `frame.len()` bytes behind `room` ours, in
        // memory of the pool that no Rust value occupies.
        unsafe { ptr::copy_nonoverlapping(frame.as_ptr(), room.cast::<u8>(), frame.len()) };
        Some(mbuf)
    }

    /// Copies a received frame; what is not a plain frame is counted.
    fn copy(&self, mbuf: *mut dpdk_sys::rte_mbuf, packet: &mut Packet) -> bool {
        // SAFETY: `mbuf` came from `rx_burst` and is ours until it is freed, here and below.
        let flags = unsafe { dpdk_sys::shim_mbuf_flags(mbuf) };
        // SAFETY: a constant of the shim.
        if flags & unsafe { dpdk_sys::SHIM_RX_VLAN_STRIPPED } != 0 {
            self.counters.tagged.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        // SAFETY: as above, `mbuf` is ours.
        let total = unsafe { dpdk_sys::shim_mbuf_pkt_len(mbuf) };
        // SAFETY: as above, `mbuf` is ours.
        let data = unsafe { dpdk_sys::shim_mbuf_data(mbuf) };
        // SAFETY: as above, `mbuf` is ours.
        let len = unsafe { dpdk_sys::shim_mbuf_data_len(mbuf) };
        // SAFETY: the first segment has `len` initialised bytes at `data`, and nobody
        // writes to them while the mbuf is ours.
        let frame = unsafe { slice::from_raw_parts(data.cast::<u8>(), usize::from(len)) };
        if total == u32::from(len) && packet.copy_from(frame) {
            return true;
        }
        self.counters.oversize.fetch_add(1, Ordering::Relaxed);
        false
    }
}

impl PacketIo for DpdkPort {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        let mut mbufs = [ptr::null_mut(); BURST];
        // SAFETY: the port was started by `open_here`, its queue has one owner
        // (`&mut self`), and `mbufs` has the 32 slots that DPDK may fill.
        let count = unsafe { dpdk_sys::shim_rx_burst(self.port, 0, mbufs.as_mut_ptr(), BURST_COUNT) };
        if let (0, Some(wait)) = (count, &self.wait) {
            // The interface went down: until somebody takes the error, its socket polls
            // readable. The driver only looks at the ring.
            let _ = rustix::net::sockopt::socket_error(wait);
        }
        for mbuf in mbufs.into_iter().take(usize::from(count)) {
            let mut packet = pool.get();
            if self.copy(mbuf, &mut packet) {
                out.push(packet);
            } else {
                pool.put(packet);
            }
            free(mbuf);
        }
    }

    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        let mut dropped = 0;
        for burst in packets.chunks(BURST) {
            let mut mbufs = [ptr::null_mut(); BURST];
            let mut filled = 0u16;
            for (slot, packet) in mbufs.iter_mut().zip(burst.iter().filter_map(|packet| self.fill(packet.as_slice()))) {
                *slot = packet.as_ptr();
                filled += 1;
            }
            let missing = burst.len() - usize::from(filled);
            self.counters.no_mbuf.fetch_add(missing as u64, Ordering::Relaxed);
            // SAFETY: the port was started by `open_here`, its queue has one owner
            // (`&mut self`), and the first `filled` slots hold mbufs of ours.
            let sent = unsafe { dpdk_sys::shim_tx_burst(self.port, 0, mbufs.as_mut_ptr(), filled) };
            for mbuf in mbufs.into_iter().take(usize::from(filled)).skip(usize::from(sent)) {
                free(mbuf);
            }
            dropped += burst.len() - usize::from(sent);
        }
        pool.put_all(packets);
        dropped
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.wait.as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl Drop for DpdkPort {
    fn drop(&mut self) {
        let _control = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.device.take());
    }
}

/// A device that is plugged in. Its end comes before that of the pool, whose mbufs
/// it holds; whoever drops it holds `CONTROL`.
struct Device {
    port: u16,
    device: *mut dpdk_sys::rte_device,
    pool: Option<Mempool>,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the port exists; one that was never started is left as it is.
        let _ = unsafe { dpdk_sys::rte_eth_dev_stop(self.port) };
        // SAFETY: the device was probed once and is removed once; the port goes with
        // it. When the driver refuses, nothing else can be done about it.
        let _ = unsafe { dpdk_sys::rte_dev_remove(self.device) };
    }
}

/// The mbufs of one port, last in first out, so that few are ever touched.
struct Mempool(NonNull<dpdk_sys::rte_mempool>);

impl Mempool {
    fn new(port: u16, count: u32) -> io::Result<Self> {
        let name = CString::new(format!("card-port-{port}"))?;
        // SAFETY: a constant of the shim.
        let headroom = unsafe { dpdk_sys::SHIM_MBUF_HEADROOM };
        let room = u16::try_from(MBUF_ROOM).map_err(io::Error::other)? + headroom;
        // SAFETY: both strings outlive the call, which copies them.
        let pool = unsafe {
            dpdk_sys::rte_pktmbuf_pool_create_by_ops(name.as_ptr(), count, 0, 0, room, ANY_SOCKET.cast_signed(), c"stack".as_ptr())
        };
        NonNull::new(pool).map(Self).ok_or_else(last_error)
    }
}

impl Drop for Mempool {
    fn drop(&mut self) {
        // SAFETY: the device is gone, and no mbuf outlives a burst on our side.
        unsafe { dpdk_sys::rte_mempool_free(self.0.as_ptr()) };
    }
}

const BURST_COUNT: u16 = 32;
const _: () = assert!(BURST == BURST_COUNT as usize);

/// Gives an mbuf back to its pool.
fn free(mbuf: *mut dpdk_sys::rte_mbuf) {
    // SAFETY: callers pass an mbuf that is theirs alone and forget it.
    unsafe { dpdk_sys::shim_mbuf_free(mbuf) };
}

/// Turns DPDK's answer into a result: negative numbers are errors, either the
/// error itself or -1 with the error in `rte_errno`.
fn check(answer: c_int) -> io::Result<c_int> {
    match answer {
        0.. => Ok(answer),
        -1 => Err(last_error()),
        _ => Err(dpdk_error(-answer)),
    }
}

/// The error of the last call on this thread.
fn last_error() -> io::Error {
    // SAFETY: reads a number of this thread.
    dpdk_error(unsafe { dpdk_sys::shim_errno() })
}

fn dpdk_error(number: c_int) -> io::Error {
    // SAFETY: takes any number and returns a string that stays until the next call
    // on this thread.
    let text: *const c_char = unsafe { dpdk_sys::rte_strerror(number) };
    // SAFETY: see above; it is copied before another call is made.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    io::Error::new(io::Error::from_raw_os_error(number).kind(), text)
}

/// The packet sockets with a ring that this process has open.
fn packet_sockets() -> io::Result<BTreeSet<RawFd>> {
    let mut sockets = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        if let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse().ok())
            && packet::has_ring(fd)
        {
            sockets.insert(fd);
        }
    }
    Ok(sockets)
}

/// What to wait on for a device just probed. DPDK has no way to ask for it, but the
/// packet socket driver has one socket with a ring per queue, and that polls
/// readable exactly while its ring holds frames. Other devices have to be polled.
fn wait_descriptor(before: &BTreeSet<RawFd>) -> Option<OwnedFd> {
    let after = packet_sockets().ok()?;
    let mut new = after.difference(before);
    let (&fd, None) = (new.next()?, new.next()) else { return None };
    // SAFETY: the driver opened it during the probe and keeps it until the device is
    // unplugged, which `CONTROL` keeps from happening now.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let wait = borrowed.try_clone_to_owned().ok()?;
    // Without the filter the driver takes the tag off and says so: counted later.
    let _ = packet::filter(&wait);
    Some(wait)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::event::{PollFd, PollFlags, poll};

    use super::namespace::tests::Namespace;
    use super::*;

    const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

    fn frame(len: usize, ethertype: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        frame.extend(ethertype);
        frame.resize(len, 0x5a);
        frame
    }

    fn send(port: &mut DpdkPort, pool: &mut Pool, frames: &[Vec<u8>]) -> usize {
        let mut packets = frames
            .iter()
            .map(|frame| {
                let mut packet = pool.get();
                assert!(packet.copy_from(frame));
                packet
            })
            .collect();
        port.tx_burst(pool, &mut packets)
    }

    /// Waits for `count` frames of ours, and takes what else is there then.
    fn receive(port: &mut DpdkPort, pool: &mut Pool, count: usize) -> Vec<Vec<u8>> {
        let start = Instant::now();
        let mut frames = Vec::new();
        loop {
            let mut out = Vec::new();
            port.rx_burst(pool, &mut out);
            if out.is_empty() && (frames.len() >= count || start.elapsed() > Duration::from_secs(5)) {
                return frames;
            }
            // Nothing but ours, whatever the kernel says when a link comes up.
            frames.extend(out.iter().map(|packet| packet.as_slice().to_vec()).filter(|frame| frame[12..14] == EXPERIMENTAL));
            pool.put_all(&mut out);
        }
    }

    fn readable(port: &DpdkPort) -> bool {
        // SAFETY: the port keeps its descriptor as long as it lives.
        let fd = unsafe { BorrowedFd::borrow_raw(port.wait_fd().unwrap()) };
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
    }

    #[test]
    fn ring_device_loops_frames_back() {
        let mut port = DpdkPort::open("net_ring_loop", None).unwrap();
        assert!(port.wait_fd().is_none());
        let mut pool = Pool::new(64);
        let frames: Vec<_> = (0..100).map(|index| frame(60 + index * 90, EXPERIMENTAL)).collect();
        for _ in 0..100 {
            assert_eq!(send(&mut port, &mut pool, &frames), 0);
            assert_eq!(receive(&mut port, &mut pool, 0), frames);
        }
    }

    #[test]
    fn null_device_takes_everything_for_ever() {
        let mut port = DpdkPort::open("net_null_sink,no-rx=1", None).unwrap();
        let mut pool = Pool::new(64);
        let frames = vec![frame(1514, EXPERIMENTAL); 64];
        for _ in 0..1000 {
            assert_eq!(send(&mut port, &mut pool, &frames), 0);
        }
        assert_eq!(port.counters().no_mbuf.load(Ordering::Relaxed), 0);
        assert!(receive(&mut port, &mut pool, 0).is_empty());
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert!(DpdkPort::open_interface("no-such-interface", None).is_err());
        assert!(DpdkPort::open("net_no_such_driver", None).is_err());
        assert!(DpdkPort::open("", None).is_err());
    }

    #[test]
    fn no_thread_is_pinned_and_none_spins() {
        let before = rustix::thread::sched_getaffinity(None).unwrap();
        drop(DpdkPort::open("net_ring_idle", None).unwrap());
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task = task.unwrap().file_name().into_string().unwrap().parse().unwrap();
            if let Ok(allowed) = rustix::thread::sched_getaffinity(rustix::thread::Pid::from_raw(task)) {
                assert_eq!(allowed, before);
            }
        }
    }

    #[test]
    fn interface_of_another_namespace_carries_frames_and_wakes() {
        let Some(namespace) = Namespace::new() else { return };
        namespace.ip("link add one mtu 9050 up type veth peer name two mtu 9050");
        namespace.ip("link set two up");
        let mut pool = Pool::new(64);
        for _ in 0..3 {
            let mut one = DpdkPort::open_interface("one", Some(&namespace.path())).unwrap();
            let mut two = DpdkPort::open_interface("two", Some(&namespace.path())).unwrap();
            assert_ne!(one.mac(), two.mac());
            // The kernel drops what is sent until it has noticed that the other end is up.
            let start = Instant::now();
            while !readable(&two) {
                assert!(start.elapsed() < Duration::from_secs(10));
                send(&mut one, &mut pool, &[frame(60, EXPERIMENTAL)]);
            }
            while readable(&two) {
                receive(&mut two, &mut pool, 0);
            }
            let frames = [frame(60, EXPERIMENTAL), frame(9064, EXPERIMENTAL)];
            let mut tagged = frame(60, [0x81, 0x00]);
            tagged[14..18].copy_from_slice(&[0, 7, 0x88, 0xb5]);
            assert_eq!(send(&mut one, &mut pool, &[frames[0].clone(), tagged, frames[1].clone()]), 0);
            assert!(readable(&two));
            assert!(receive(&mut two, &mut pool, 2) == frames);
            assert!(!readable(&two), "an empty ring lets the worker sleep");
            for round in 0..20 {
                let many = vec![frame(1514, EXPERIMENTAL); 50 + round];
                assert_eq!(send(&mut one, &mut pool, &many), 0);
                assert_eq!(receive(&mut two, &mut pool, many.len()).len(), many.len());
            }
            namespace.ip("link set two down");
            assert!(readable(&two));
            receive(&mut two, &mut pool, 0);
            assert!(!readable(&two), "an interface that is down lets the worker sleep");
            namespace.ip("link set two up");
        }
    }
}
