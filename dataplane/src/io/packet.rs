//! A network interface of the machine by an `AF_PACKET` socket, packet(7): for
//! tests, simulated wires and servers without a supported network card.
//!
//! Only frames as they travel on a wire come in: what this machine sends out of
//! the interface and VLAN-tagged frames are filtered in the kernel, and what
//! senders on a virtual wire leave to the card is done in `offload`.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::CString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{size_of, size_of_val, zeroed};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_void, sock_filter, sock_fprog};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use self::offload::{HEADER_LEN, Offload};
use super::{BURST, PacketIo, namespace};
use crate::packet::{Packet, Pool};

mod offload;

/// A super-frame: 64 KiB of IP behind an Ethernet header. One byte more tells a
/// frame that just fits from one that was cut.
const SUPER_FRAME_MAX: usize = 14 + 65_536 + 1;
/// Bytes that wait in the kernel while the worker is busy elsewhere.
const RECEIVE_BUFFER: usize = 4 << 20;

/// One interface, opened for all its frames.
#[derive(Debug)]
pub struct PacketPort {
    socket: OwnedFd,
    mac: [u8; 6],
    mtu: u32,
    /// What the last read was cut into beyond a burst.
    waiting: VecDeque<Packet>,
    scratch: Vec<u8>,
    counters: Arc<PacketCounters>,
}

/// Frames that were refused on reception, since the socket was opened.
#[derive(Debug, Default)]
pub struct PacketCounters {
    /// Super-frames of a kind that is not cut here, and frames too long to carry.
    pub unsupported: AtomicU64,
    /// Reads that failed, as when the interface goes down.
    pub errors: AtomicU64,
}

impl PacketPort {
    /// Opens `interface`, inside the network namespace at `netns` when one is
    /// given. It gets all frames, whatever their destination address.
    ///
    /// # Errors
    /// Without the capabilities `NET_RAW` (and `SYS_ADMIN` for a namespace), or
    /// when there is no such interface or namespace.
    pub fn open(interface: &str, netns: Option<&Path>) -> io::Result<Self> {
        namespace::within(netns, || Self::open_here(interface))
            .map_err(|error| io::Error::new(error.kind(), format!("interface {interface}: {error}")))
    }

    fn open_here(interface: &str) -> io::Result<Self> {
        // Protocol 0: nothing is received until the filter stands and it is bound.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
        let interface = Interface::find(&socket, interface)?;
        filter(&socket)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut member: libc::packet_mreq = unsafe { zeroed() };
        member.mr_ifindex = interface.index;
        member.mr_type = u16::try_from(libc::PACKET_MR_PROMISC).map_err(io::Error::other)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &member)?;
        // Needs a capability beyond raw sockets; the default only drops sooner.
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER);
        bind(&socket, interface.index)?;
        Ok(Self {
            socket,
            mac: interface.mac,
            mtu: interface.mtu,
            waiting: VecDeque::new(),
            scratch: vec![0; SUPER_FRAME_MAX],
            counters: Arc::default(),
        })
    }

    /// The interface's own address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The interface's limit, in bytes of IP, when it was opened.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// What was refused; stays valid when the port has moved into a worker.
    #[must_use]
    pub fn counters(&self) -> Arc<PacketCounters> {
        Arc::clone(&self.counters)
    }

    /// Reads one frame and finishes it. False when none waits.
    fn receive(&mut self, pool: &mut Pool) -> bool {
        let mut header = [0; HEADER_LEN];
        let mut buffers = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut self.scratch)];
        let len = match rustix::io::readv(&self.socket, &mut buffers) {
            Ok(len) => len,
            Err(Errno::AGAIN) => return false,
            Err(_) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                return true;
            }
        };
        let len = len.saturating_sub(HEADER_LEN);
        let finished = match self.scratch.get_mut(..len) {
            Some(frame) if len < SUPER_FRAME_MAX => Offload::parse(header).finish(frame, pool, &mut self.waiting),
            _ => Err(offload::Unsupported),
        };
        if finished.is_err() {
            self.counters.unsupported.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}

impl PacketIo for PacketPort {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        // Every read counts, so that frames which give nothing cannot hold the worker.
        let mut reads = 0;
        while self.waiting.len() < BURST && reads < BURST && self.receive(pool) {
            reads += 1;
        }
        out.extend(self.waiting.drain(..self.waiting.len().min(BURST)));
    }

    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        // An all-zero header: nothing is left to the card.
        let header = [0; HEADER_LEN];
        let mut dropped = 0;
        for packet in packets.iter() {
            let buffers = [IoSlice::new(&header), IoSlice::new(packet.as_slice())];
            dropped += usize::from(rustix::io::writev(&self.socket, &buffers).is_err());
        }
        pool.put_all(packets);
        dropped
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }
}

/// Lets only frames in that came in over the wire and carry no VLAN tag.
pub(super) fn filter(socket: &OwnedFd) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &Filter::program())
}

/// Whether `fd` is a packet socket in the mode with frame headers of version 2.
#[cfg(feature = "dpdk")]
pub(super) fn has_ring(fd: RawFd) -> bool {
    const TPACKET_V2: c_int = 1;
    let mut version: c_int = -1;
    let Ok(mut len) = libc::socklen_t::try_from(size_of_val(&version)) else { return false };
    let (value, size) = (std::ptr::from_mut(&mut version).cast::<c_void>(), &raw mut len);
    // SAFETY: the kernel writes at most `len` bytes to `version`; a descriptor that
    // is closed or no packet socket is an error.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_VERSION, value, size) };
    result == 0 && version == TPACKET_V2
}

/// What has to be known of an interface, netdevice(7).
struct Interface {
    index: c_int,
    mac: [u8; 6],
    mtu: u32,
}

impl Interface {
    fn find(socket: &OwnedFd, name: &str) -> io::Result<Self> {
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut request: libc::ifreq = unsafe { zeroed() };
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        let name = name.as_bytes_with_nul();
        if name.len() > request.ifr_name.len() {
            return Err(Errno::NODEV.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name) {
            *to = from.cast_signed();
        }
        ioctl(socket, libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX filled this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        ioctl(socket, libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU filled this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        ioctl(socket, libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR filled this member.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let [a, b, c, d, e, f, ..] = address.sa_data.map(i8::cast_unsigned);
        Ok(Self { index, mac: [a, b, c, d, e, f], mtu: u32::try_from(mtu).unwrap_or(0) })
    }
}

fn ioctl(socket: &OwnedFd, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the requests of `Interface::find` read and write one `ifreq`, which
    // is borrowed for the call and ends its name with a zero.
    if unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_option<T>(socket: &OwnedFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: pointer and length describe `value`, which is borrowed for the call;
    // the kernel copies it and checks that the length fits the option.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast::<c_void>(), len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Receives all protocols from the interface with this index.
fn bind(socket: &OwnedFd, index: c_int) -> io::Result<()> {
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
    address.sll_ifindex = index;
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: pointer and length describe `address`, which the kernel copies.
    let result = unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast::<libc::sockaddr>(), len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A classic BPF program: passes frames that came in and carry no VLAN tag. The
/// kernel takes tags off before a packet socket sees the frame, so that a tagged
/// frame would look like an untagged one.
struct Filter;

impl Filter {
    const LOAD: u16 = 0x20; // LD | W | ABS
    const EQUAL: u16 = 0x15; // JMP | JEQ | K
    const RETURN: u16 = 0x06; // RET | K
    const VLAN_TAG_PRESENT: u32 = 0xffff_f000 + 48; // SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT
    const PACKET_TYPE: u32 = 0xffff_f000 + 4; // SKF_AD_OFF + SKF_AD_PKTTYPE
    const OUTGOING: u32 = 4; // PACKET_OUTGOING

    const CODE: [sock_filter; 6] = [
        Self::step(Self::LOAD, 0, 0, Self::VLAN_TAG_PRESENT),
        Self::step(Self::EQUAL, 0, 3, 0),
        Self::step(Self::LOAD, 0, 0, Self::PACKET_TYPE),
        Self::step(Self::EQUAL, 1, 0, Self::OUTGOING),
        Self::step(Self::RETURN, 0, 0, u32::MAX),
        Self::step(Self::RETURN, 0, 0, 0),
    ];

    const fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
        sock_filter { code, jt, jf, k }
    }

    fn program() -> sock_fprog {
        static CODE: [sock_filter; 6] = Filter::CODE;
        // The kernel only reads through the pointer. 6 steps fit any integer.
        sock_fprog { len: 6, filter: CODE.as_ptr().cast_mut() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::namespace::tests::Namespace;
    use super::*;

    /// A frame between two made-up stations.
    fn frame(len: usize, ethertype: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        frame.extend(ethertype);
        frame.resize(len, 0x5a);
        frame
    }

    fn send(port: &mut PacketPort, pool: &mut Pool, frame: &[u8]) -> usize {
        let mut packet = pool.get();
        assert!(packet.copy_from(frame));
        port.tx_burst(pool, &mut vec![packet])
    }

    /// Waits for `count` frames of ours, or a little while for none.
    fn receive(port: &mut PacketPort, pool: &mut Pool, count: usize) -> Vec<Vec<u8>> {
        let start = Instant::now();
        let patience = if count == 0 { Duration::from_millis(50) } else { Duration::from_secs(5) };
        let mut mine = Vec::new();
        while start.elapsed() < patience && (count == 0 || mine.len() < count) {
            let mut out = Vec::new();
            port.rx_burst(pool, &mut out);
            // Nothing but ours, whatever the kernel says when a link comes up.
            mine.extend(out.iter().map(|packet| packet.as_slice().to_vec()).filter(|frame| frame[12..14] == [0x88, 0xb5]));
            pool.put_all(&mut out);
            thread::sleep(Duration::from_millis(1));
        }
        mine
    }

    /// The kernel drops what is sent until it has noticed that the other end is up.
    fn wait_for_link(one: &mut PacketPort, two: &mut PacketPort, pool: &mut Pool) {
        let start = Instant::now();
        let hello = frame(60, [0x88, 0xb5]);
        while receive(two, pool, 0).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10));
            send(one, pool, &hello);
        }
        receive(two, pool, 0);
    }

    #[test]
    fn frames_cross_a_wire_once_and_whole() {
        let Some(namespace) = Namespace::new() else { return };
        namespace.ip("link add one mtu 9001 up type veth peer name two mtu 9001");
        namespace.ip("link set two up");
        let mut one = PacketPort::open("one", Some(&namespace.path())).unwrap();
        let mut two = PacketPort::open("two", Some(&namespace.path())).unwrap();
        assert_eq!(one.mtu(), 9001);
        assert_ne!(one.mac(), two.mac());
        let mut pool = Pool::new(64);
        wait_for_link(&mut one, &mut two, &mut pool);
        let frames = [frame(60, [0x88, 0xb5]), frame(9015, [0x88, 0xb5])];
        for frame in &frames {
            assert_eq!(send(&mut one, &mut pool, frame), 0);
        }
        // A tagged frame does not pass for an untagged one.
        let mut tagged = frame(60, [0x81, 0x00]);
        tagged[14..18].copy_from_slice(&[0, 7, 0x88, 0xb5]);
        assert_eq!(send(&mut one, &mut pool, &tagged), 0);
        assert_eq!(send(&mut one, &mut pool, &frame(9100, [0x88, 0xb5])), 1, "longer than the interface takes");
        assert!(receive(&mut two, &mut pool, 2) == frames);
        assert!(receive(&mut two, &mut pool, 0).is_empty(), "neither the tagged one nor the long one");
        assert!(receive(&mut one, &mut pool, 0).is_empty(), "what went out does not come in");
        namespace.ip("link set two down");
        assert_eq!(send(&mut two, &mut pool, &frames[0]), 1);
        namespace.ip("link set two up");
        // It goes on after the interface was down.
        wait_for_link(&mut one, &mut two, &mut pool);
    }

    #[test]
    fn tcp_of_two_kernels_crosses_as_frames_of_a_real_wire() {
        const BYTES: usize = 8 << 20;
        let (Some(middle), Some(left), Some(right)) = (Namespace::new(), Namespace::new(), Namespace::new()) else {
            return;
        };
        for (end, address) in [(&left, "10.9.0.1/24"), (&right, "10.9.0.2/24")] {
            let name = if address.contains(".1/") { "left" } else { "right" };
            middle.ip(&format!("link add {name} up type veth peer name eth netns {}", end.path().display()));
            end.ip(&format!("address add {address} dev eth"));
            end.ip("link set eth up");
        }
        let mut ports = ["left", "right"].map(|name| PacketPort::open(name, Some(&middle.path())).unwrap());
        let listener = right.run(|| TcpListener::bind((Ipv4Addr::new(10, 9, 0, 2), 80)).unwrap());
        let server = thread::spawn(move || {
            let mut content = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut content).unwrap();
            content
        });
        let client = thread::spawn(move || {
            left.run(|| TcpStream::connect((Ipv4Addr::new(10, 9, 0, 2), 80)).unwrap())
                .write_all(&(0..BYTES).map(|index| index.to_le_bytes()[1]).collect::<Vec<_>>())
                .unwrap();
        });
        let mut pool = Pool::new(64);
        let start = Instant::now();
        while !server.is_finished() {
            assert!(start.elapsed() < Duration::from_secs(20));
            for (from, to) in [(0, 1), (1, 0)] {
                let mut frames = Vec::new();
                ports[from].rx_burst(&mut pool, &mut frames);
                assert!(frames.iter().all(|frame| frame.len() <= 1514));
                ports[to].tx_burst(&mut pool, &mut frames);
            }
        }
        client.join().unwrap();
        let content = server.join().unwrap();
        assert_eq!(content.len(), BYTES);
        assert!(content.iter().enumerate().all(|(index, byte)| *byte == index.to_le_bytes()[1]));
        assert_eq!(ports[0].counters().unsupported.load(Ordering::Relaxed), 0);
    }
}
