//! Bytes of any kind from any side: nothing panics, nothing passes unseen.

use proptest::prelude::*;

use super::lab::*;
use crate::headers::tcp as flag;
use crate::pipeline::{Device, ROUTER_MAC};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];
const X: [u8; 4] = [198, 51, 100, 16];
const GATE: [u8; 4] = [10, 0, 9, 9];
const N: [u8; 4] = [198, 51, 100, 30];

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    let mut a = guest(1, 100, A);
    a.public = Some(X.into());
    a.ingress = vec![tcp_rule(22, ANY), udp_rule(22, ANY), icmp_rule(ANY)];
    lab.place(0, vec![a]);
    lab.place(1, vec![guest(2, 100, B)]);
    let gateway = NatGatewayConfig {
        id: NatGatewayId(1),
        vni: Vni(100),
        mac: end(GATE, 0).mac,
        ipv4: GATE.into(),
        subnet: Prefix::new([10, 0, 9, 0].into(), 24),
        vpc_prefixes: vec![Prefix::new([10, 0, 0, 0].into(), 16)],
        routes: vec![route([0, 0, 0, 0], 0, RouteTarget::InternetGateway)],
        acl: Some(Acl { ingress: vec![acl_tcp(true, (0, 65535), EVERYWHERE)], egress: vec![acl_tcp(true, (0, 65535), EVERYWHERE)] }),
        public: vec![N.into()],
    };
    lab.place_gateway(0, gateway);
    let resolver = ResolverConfig { domain: "ec2.internal".into(), public_domain: Some("amazonaws.com".into()) };
    lab.network(100, |network| network.resolver = Some(resolver.clone()));
    lab
}

fn device() -> impl Strategy<Value = Device> {
    prop::sample::select(vec![Device::Port(PortId(1)), Device::Port(PortId(9)), Device::Underlay, Device::Public])
}

/// A frame that passes where it is meant for, one of every kind that is looked into.
fn valid() -> Vec<(Device, Vec<u8>)> {
    let internet = End { mac: GATEWAY_MAC, ip: [203, 0, 113, 9].into(), port: 53 };
    let me = End { mac: public_mac(0), ip: X.into(), port: 22 };
    let port = Device::Port(PortId(1));
    let mut error = vec![3, 3, 0, 0, 0, 0, 0, 0];
    error.extend(&udp(end(A, 5), end(B, 53), b"quoted")[14..]);
    let mut dhcp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(236, 0);
    dhcp[28..34].copy_from_slice(&end(A, 0).mac.0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 55, 4, 1, 3, 6, 12, 255]);
    let all = End { mac: Mac::BROADCAST, ip: [255; 4].into(), port: 67 };
    vec![
        (port, tcp(end(A, 5), end(B, 53), flag::SYN, b"data")),
        (port, udp(end(A, 5), end(B, 53), b"data")),
        (port, ping(end(A, 0), End { mac: ROUTER_MAC, ip: [10, 0, 0, 1].into(), port: 0 }, 8, 1)),
        (port, udp(end(A, 5), via_router(internet), b"data")),
        (
            port,
            udp(
                end(A, 5),
                End { mac: ROUTER_MAC, ip: crate::resolver::ADDRESS, port: 53 },
                b"ab\x01\0\0\x01\0\0\0\0\0\x01\0\0\x01\0\x01\0\0\x29\0\0\0\0\0\0\0\0",
            ),
        ),
        (port, frame(end(A, 0), end(B, 0), 1, (1, 0), error.clone())),
        (port, arp_frame(1, (end(A, 0).mac, A.into()), (Mac([0; 6]), B.into()))),
        (port, udp(End { ip: [0; 4].into(), ..end(A, 68) }, all, &dhcp)),
        (Device::Underlay, encapsulated(vtep(1), 0, 100, &udp(end(B, 5), end(A, 22), b"data"))),
        (Device::Underlay, encapsulated(vtep(1), 0, 100, &frame(end(B, 0), end(A, 0), 1, (1, 0), error.clone()))),
        (Device::Underlay, encapsulated(vtep(1), 0, 100, &tcp(end(B, 5), End { mac: end(GATE, 0).mac, ..internet }, flag::SYN, b"data"))),
        (Device::Underlay, encapsulated(vtep(1), 0, 100, &tcp(end(B, 5), End { mac: end(GATE, 0).mac, ..internet }, flag::ACK, b"data"))),
        (Device::Underlay, arp_frame(1, (underlay_mac(1), vtep(1)), (Mac([0; 6]), vtep(0)))),
        (Device::Public, tcp(internet, me, flag::SYN, b"data")),
        (Device::Public, frame(internet, me, 1, (1, 0), error)),
        (Device::Public, arp_frame(1, (GATEWAY_MAC, GATEWAY), (Mac([0; 6]), X.into()))),
    ]
}

#[test]
fn every_truncation_of_every_valid_frame_is_taken() {
    let mut lab = lab();
    for (device, frame) in valid() {
        for len in 0..=frame.len() {
            lab.feed(0, device, &frame[..len]);
        }
    }
}

#[test]
fn every_valid_frame_passes_or_is_answered() {
    for (device, frame) in valid() {
        let mut lab = lab();
        let seen = lab.feed(0, device, &frame);
        let came_out = seen.guests.len() + seen.public.len() + seen.underlay.len();
        assert!(came_out > 0, "{device:?} {frame:02x?}");
    }
}

/// Puts the right checksum over an IPv4 header at `at`, so that a mutation gets further.
fn mend(frame: &mut [u8], at: usize) {
    let Some(header) = frame.get(at..at + 20) else { return };
    let mut header = header.to_vec();
    header[10..12].fill(0);
    let sum = crate::headers::checksum(&header);
    crate::headers::write(frame, at + 10, sum.to_be_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(device in device(), bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        lab().feed(0, device, &bytes);
    }

    #[test]
    fn mutated_frames_never_panic(
        which in 0usize..13,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        len: prop::sample::Index,
        truncate: bool,
        mended: bool,
    ) {
        let mut lab = lab();
        let (device, original) = valid().swap_remove(which);
        // The valid frame first, so that there is a flow to hit.
        lab.feed(0, device, &original);
        let mut frame = original.clone();
        for (at, value) in changes {
            let at = at.index(frame.len());
            frame[at] = value;
        }
        if mended {
            mend(&mut frame, 14);
            mend(&mut frame, 14 + 20 + 8 + 8 + 14);
        }
        if truncate {
            frame.truncate(len.index(frame.len()));
        }
        let seen = lab.feed(0, device, &frame);
        // Whoever it reached, the frame is whole and its header checksum right.
        for (_, _, got) in &seen.guests {
            if got[12..14] == [8, 0] {
                prop_assert!(crate::headers::ipv4(&got[14..]).is_ok());
            }
        }
    }

    #[test]
    fn dhcp_options_of_any_content_never_panic(options in prop::collection::vec(any::<u8>(), 0..300), hlen: u8) {
        let mut lab = lab();
        let mut message = vec![1, 1, hlen, 0, 1, 2, 3, 4];
        message.resize(236, 0);
        message[28..34].copy_from_slice(&end(A, 0).mac.0);
        message.extend([99, 130, 83, 99]);
        message.extend(&options);
        let all = End { mac: Mac::BROADCAST, ip: [255; 4].into(), port: 67 };
        lab.send(0, 1, &udp(End { ip: [0; 4].into(), ..end(A, 68) }, all, &message));
    }
}
