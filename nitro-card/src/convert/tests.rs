use super::*;

fn port() -> card::Port {
    card::Port {
        id: "eni-1".into(),
        generation: 1,
        instance_id: "i-1".into(),
        vni: 7,
        mac: vec![2, 0, 0, 0, 0, 1],
        private_ipv4: 0x0a00_0105,
        subnet: Some(card::Prefix { address: 0x0a00_0100, length: 24 }),
        mtu: 9001,
        ..card::Port::default()
    }
}

fn to(target: route::Target) -> card::Route {
    card::Route { destination: Some(card::Prefix::default()), target: Some(target) }
}

fn gateway() -> card::NatGateway {
    card::NatGateway {
        id: "nat-1".into(),
        generation: 1,
        vni: 7,
        mac: vec![2, 0, 0, 0, 0, 9],
        private_ipv4: 0x0a00_0009,
        subnet: Some(card::Prefix { address: 0x0a00_0000, length: 24 }),
        routes: vec![to(route::Target::InternetGateway(true))],
        public_ipv4: vec![0xc633_641e],
        ..card::NatGateway::default()
    }
}

/// `change` breaks a good port; the refusal has to name `field`.
fn refused(field: &str, change: fn(&mut card::Port)) {
    let mut message = port();
    change(&mut message);
    assert_eq!(Port::try_from(message).unwrap_err().field, field);
}

#[test]
fn a_bad_field_is_named() {
    assert!(Port::try_from(port()).is_ok());
    refused("port.id", |port| port.id = "../etc".into());
    refused("port.vni", |port| port.vni = 0);
    refused("port.vni", |port| port.vni = 1 << 24);
    refused("port.mac", |port| port.mac = vec![2; 5]);
    refused("port.mac", |port| port.mac = vec![0xff; 6]);
    refused("port.mtu", |port| port.mtu = 9002);
    refused("port.subnet", |port| port.subnet = None);
    refused("port.subnet", |port| port.subnet = Some(card::Prefix { address: 0, length: 33 }));
    refused("port.routes", |port| port.routes = vec![card::Route::default()]);
    refused("port.routes", |port| port.routes = vec![to(route::Target::NatGateway(0))]);
    refused("port.routes", |port| port.routes = vec![to(route::Target::PeerVni(1 << 24))]);
    refused("port.acl", |port| {
        port.acl = Some(card::Acl { egress: vec![card::AclRule { protocol: 256, ..Default::default() }], ..Default::default() });
    });
    refused("port.secondary", |port| port.secondary = vec![card::Address::default()]);
    refused("port.connection_tracking", |port| {
        port.connection_tracking = Some(card::ConnectionTracking { udp_s: 61, ..Default::default() });
    });
    refused("port.ingress", |port| port.ingress = vec![card::Rule { protocol: 6, ..card::Rule::default() }]);
    refused("port.dhcp", |port| port.dhcp = Some(card::Dhcp { hostname: "a\nb".into(), ..card::Dhcp::default() }));
}

#[test]
fn every_target_acl_and_timeout_of_a_port_passes_to_the_packet_path() {
    let deny = card::AclRule { allow: false, protocol: 6, from_port: 22, to_port: 22, remote: Some(card::Prefix::default()) };
    let message = card::Port {
        routes: vec![
            to(route::Target::NatGateway(1)),
            to(route::Target::NetworkInterface(2)),
            to(route::Target::PeerVni(3)),
            to(route::Target::Blackhole(true)),
        ],
        acl: Some(card::Acl { ingress: vec![deny], egress: Vec::new() }),
        connection_tracking: Some(card::ConnectionTracking { tcp_established_s: 60, ..Default::default() }),
        secondary: vec![card::Address { private_ipv4: 0x0a00_0106, public_ipv4: 0 }],
        limits: Some(card::Limits { packets_per_s: 7, ..Default::default() }),
        ..port()
    };
    let config = Port::try_from(message)
        .unwrap()
        .config(dataplane::PortId(1), dataplane::AllowanceId(1), &mut |_| unreachable!("no rule names a group"));
    let targets: Vec<_> = config.routes.iter().map(|route| route.target).collect();
    let [one, two] = [1, 2].map(Ipv4Addr::from);
    let expected = [RouteTarget::NatGateway(one), RouteTarget::NetworkInterface(two), RouteTarget::Peer(Vni(3)), RouteTarget::Blackhole];
    assert_eq!(targets, expected);
    let acl = config.acl.clone().unwrap();
    assert!(acl.egress.is_empty() && acl.ingress.iter().all(|rule| !rule.allow && rule.ports == Some((22, 22))));
    assert_eq!(config.tracking, ConnectionTracking { tcp_established_s: 60, ..ConnectionTracking::default() });
    assert!(config.owns(Ipv4Addr::new(10, 0, 1, 6)));
    let limits = Limits { packets_per_s: 7, ..Limits::default() };
    assert_eq!(config.allowance, Some(dataplane::AllowanceConfig { id: dataplane::AllowanceId(1), limits }));
    assert_eq!(Port::try_from(port()).unwrap().acl, None, "an older control sends none, and all passes");
}

#[test]
fn a_nat_gateway_has_one_to_eight_addresses() {
    let good = NatGateway::try_from(gateway()).unwrap();
    assert_eq!(good.config(dataplane::NatGatewayId(1)).public, [Ipv4Addr::new(198, 51, 100, 30)]);
    for public_ipv4 in [vec![], vec![0], vec![1; 9]] {
        let refused = NatGateway::try_from(card::NatGateway { public_ipv4, ..gateway() });
        assert_eq!(refused.unwrap_err().field, "nat_gateway.public_ipv4");
    }
    let refused = NatGateway::try_from(card::NatGateway { mac: vec![1; 6], ..gateway() });
    assert_eq!(refused.unwrap_err().field, "nat_gateway.mac");
}

#[test]
fn a_network_has_peers_and_a_resolver() {
    let resolver = card::Resolver { domain: "ec2.internal".into(), hostnames: false, public_domain: "amazonaws.com".into() };
    let mapping =
        card::Mapping { private_ipv4: 0x0a00_0105, mac: vec![2; 6], underlay_ipv4: 0x0aff_0001, forwards: true, public_ipv4: 0xc633_6410 };
    let message = card::Network {
        id: "vpc-1".into(),
        vni: 7,
        mappings: vec![mapping],
        peers: vec![8],
        resolver: Some(resolver.clone()),
        ..card::Network::default()
    };
    let config = Network::try_from(message.clone()).unwrap().config(&mut |_| unreachable!("it has no groups"));
    assert_eq!(config.peers, [Vni(8)]);
    assert_eq!(config.resolver, Some(ResolverConfig { domain: "ec2.internal".into(), public_domain: None }));
    assert!(config.mappings.iter().all(|mapping| mapping.forwards && mapping.public == Some(Ipv4Addr::new(198, 51, 100, 16))));
    for domain in ["", "a..b", "a b", &"a".repeat(64)] {
        let resolver = Some(card::Resolver { domain: domain.into(), ..resolver.clone() });
        let refused = Network::try_from(card::Network { resolver, ..message.clone() });
        assert_eq!(refused.unwrap_err().field, "network.resolver", "{domain:?}");
    }
    let refused = Network::try_from(card::Network { peers: vec![0], ..message });
    assert_eq!(refused.unwrap_err().field, "network.peers");
}

#[test]
fn rules_take_ports_for_tcp_and_codes_for_icmp() {
    let remote = Some(rule::Remote::GroupId("sg-1".into()));
    let tcp = card::Rule { protocol: 6, from_port: 22, to_port: 23, remote: remote.clone() };
    assert_eq!(rule(tcp.clone(), "x").unwrap().ports, Some((22, 23)));
    assert!(rule(card::Rule { from_port: 24, ..tcp.clone() }, "x").is_err());
    assert_eq!(rule(card::Rule { from_port: -1, to_port: -1, ..tcp }, "x").unwrap().ports, None);
    let icmp = card::Rule { protocol: 1, from_port: 8, to_port: -1, remote: remote.clone() };
    assert_eq!(rule(icmp, "x").unwrap().icmp, (Some(8), None));
    let any = card::Rule { protocol: 256, from_port: 0, to_port: 0, remote };
    assert_eq!(rule(any, "x").unwrap().protocol, Protocol::Any);
}

#[test]
fn object_keys_stay_inside_the_store() {
    for key in ["../x", "a/b", ".hidden", "a\0b"] {
        assert!(object_key(key.into(), "x").is_err(), "{key:?}");
    }
    assert_eq!(object_key(String::new(), "x"), Ok(None));
    assert_eq!(object_key("mini-1.raw".into(), "x"), Ok(Some("mini-1.raw".into())));
}
