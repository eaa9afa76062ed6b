//! The internet of a rack that has no root: a switch for public frames, and behind it
//! one host that is the gateway of the public network and everything beyond it.
//!
//! ```text
//!   card ══ cable ══╗
//!   card ══ cable ══╬═ switch ═══ gateway ──── proxy at 127.0.0.1 ──── ssh, curl of the user
//!                   ╝  frames     TCP in user space      HTTP CONNECT
//! ```
//!
//! A guest sees a router that answers ARP and ping, and connections from the
//! gateway's address. Nothing of the product knows of this process: the cards speak
//! Ethernet on their cables, so NAT, security groups and flows are all in force.
//!
//! One thread, one `poll`. What comes from cards and clients is checked, bounded
//! and never ends the process.
//!
//! Settings (TOML): `listen`, `gateway`, `prefix_length`, `far_host`, and for each card
//! a `[[cable]]` with `near` and `far`.

mod gateway;
mod proxy;
mod switch;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;

use gateway::Gateway;
use proxy::Proxy;
use switch::{Port, Switch};

/// The largest frame of the public network, and a byte more to notice a giant.
const FRAME_ROOM: usize = 1515;
/// Frames taken from one cable before the others have their turn.
const BURST: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Where clients ask for connections to public addresses.
    listen: SocketAddr,
    /// Address of the gateway in the public network.
    gateway: Ipv4Addr,
    prefix_length: u8,
    /// A host behind the gateway that answers pings.
    far_host: Ipv4Addr,
    cable: Vec<Cable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cable {
    near: SocketAddrV4,
    far: SocketAddrV4,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [flag, path] = arguments.as_slice() else {
        eprintln!("usage: internet --config FILE");
        return ExitCode::FAILURE;
    };
    let result = if flag == "--config" { run(path) } else { Err(format!("unknown flag {flag}")) };
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("internet: {error}");
    ExitCode::FAILURE
}

fn run(path: &str) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let settings: Settings = toml::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
    let mut cables = Vec::new();
    for cable in &settings.cable {
        let plugged = UdpSocket::bind(cable.near).and_then(|socket| {
            socket.connect(cable.far)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        cables.push(plugged.map_err(|error| format!("cable at {}: {error}", cable.near))?);
    }
    let listener = TcpListener::bind(settings.listen).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listener.map_err(|error| format!("listen on {}: {error}", settings.listen))?;
    let begun = Instant::now();
    let mut gateway = Gateway::new(settings.gateway, settings.prefix_length, settings.far_host);
    let mut switch = Switch::default();
    let mut proxy = Proxy::default();
    eprintln!("internet: {} cables, connections by way of http://{}", cables.len(), settings.listen);
    loop {
        wait(&cables, &listener, &proxy, gateway.pause(begun.elapsed()))?;
        for (number, cable) in cables.iter().enumerate() {
            let mut room = [0; FRAME_ROOM];
            for _ in 0..BURST {
                match cable.recv(&mut room) {
                    Ok(len) if len < FRAME_ROOM => {
                        let to = switch.frame(Port::Cable(number), &room[..len]);
                        deliver(to, &room[..len], Some(number), &cables, &mut gateway);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    // A giant, or what a frame to a card that is not there left behind.
                    _ => {}
                }
            }
        }
        proxy.accept(&listener);
        loop {
            let moved = proxy.serve(&mut gateway);
            let frames = gateway.poll(begun.elapsed());
            if !moved && frames.is_empty() {
                break;
            }
            for frame in frames {
                let to = switch.frame(Port::Gateway, &frame);
                deliver(to, &frame, None, &cables, &mut gateway);
            }
        }
    }
}

/// Sends a frame where the switch says; a full cable drops it, as a full queue of a switch does.
fn deliver(to: switch::Destination, frame: &[u8], from: Option<usize>, cables: &[UdpSocket], gateway: &mut Gateway) {
    let others = || cables.iter().enumerate().filter(|(number, _)| Some(*number) != from);
    match to {
        switch::Destination::Nobody => {}
        switch::Destination::One(Port::Gateway) => gateway.receive(frame),
        switch::Destination::One(Port::Cable(number)) => {
            others().filter(|(other, _)| *other == number).for_each(|(_, cable)| drop(cable.send(frame)));
        }
        switch::Destination::All => {
            others().for_each(|(_, cable)| drop(cable.send(frame)));
            if from.is_some() {
                gateway.receive(frame);
            }
        }
    }
}

/// Waits until there is something to do.
fn wait(cables: &[UdpSocket], listener: &TcpListener, proxy: &Proxy, pause: std::time::Duration) -> Result<(), String> {
    let mut fds: Vec<PollFd<'_>> = cables.iter().map(|cable| PollFd::from_borrowed_fd(cable.as_fd(), PollFlags::IN)).collect();
    if proxy.has_room() {
        fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
    }
    fds.extend(proxy.interests().map(|(client, events)| PollFd::from_borrowed_fd(client.as_fd(), events)));
    let timeout = Timespec { tv_sec: i64::try_from(pause.as_secs()).unwrap_or(1), tv_nsec: pause.subsec_nanos().into() };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(format!("poll: {errno}")),
    }
}
