//! Acceptance 3: two guests of one VPC on two cards, and everybody else.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hw_sim::{Instance, Region, root_or_skip};

/// A capture on the underlay bridge.
struct Capture {
    tcpdump: Child,
    file: PathBuf,
}

impl Capture {
    fn begin(region: &Region, name: &str) -> Self {
        let file = region.dir().join(format!("{name}.pcap"));
        let namespace = region.ready("wire_namespace").as_str().expect("namespace");
        let tcpdump = Command::new("ip")
            .args(["netns", "exec", namespace, "tcpdump", "-i", "underlay", "-U", "-s", "160", "-Z", "root", "-w"])
            .arg(&file)
            .stderr(Stdio::null())
            .spawn()
            .expect("tcpdump");
        region.eventually("the capture has begun", 5, || file.metadata().is_ok_and(|meta| meta.len() >= 24));
        Self { tcpdump, file }
    }

    /// Every frame that was on the wire.
    fn end(mut self) -> Vec<Vec<u8>> {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let _ = Command::new("kill").arg(self.tcpdump.id().to_string()).status();
        let _ = self.tcpdump.wait();
        frames(&self.file)
    }
}

/// The frames of a pcap file in the writer's byte order.
fn frames(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).expect("capture");
    let mut rest = bytes.get(24..).unwrap_or_default();
    let mut frames = Vec::new();
    while let Some(header) = rest.get(..16) {
        let length = u32::from_le_bytes(header[8..12].try_into().expect("4 bytes")) as usize;
        let Some(frame) = rest.get(16..16 + length) else { break };
        frames.push(frame.to_vec());
        rest = &rest[16 + length..];
    }
    frames
}

/// The VNI of a VXLAN frame, `None` for ARP, a panic for anything else.
fn vni(frame: &[u8]) -> Option<u32> {
    if frame[12..14] == [0x08, 0x06] {
        return None;
    }
    assert_eq!(frame[12..14], [0x08, 0x00], "neither ARP nor IPv4: {frame:02x?}");
    let udp = 14 + usize::from(frame[14] & 0x0f) * 4;
    assert_eq!(frame[23], 17, "not UDP: {frame:02x?}");
    assert_eq!(frame[udp + 2..udp + 4], 4789_u16.to_be_bytes(), "not VXLAN: {frame:02x?}");
    let vxlan = udp + 8;
    assert_eq!(frame[vxlan] & 0x08, 0x08, "VXLAN without a VNI");
    Some(u32::from_be_bytes([0, frame[vxlan + 4], frame[vxlan + 5], frame[vxlan + 6]]))
}

#[test]
fn guests_of_one_vpc_reach_each_other_over_vxlan_and_nobody_else_does() {
    if !root_or_skip("network") {
        return;
    }
    let region = Region::start("network", &["--zones", "2"]);
    let zones = region.call("DescribeAvailabilityZones", &[]).all("zoneName");
    let first = region.launch(&[("Placement.AvailabilityZone", &zones[0])]);
    let second = region.launch(&[("Placement.AvailabilityZone", &zones[1])]);
    let (first_card, second_card) = (region.card_of(&first.id), region.card_of(&second.id));
    assert_ne!(first_card, second_card);
    region.wait_ssh(&first, 60);
    region.wait_ssh(&second, 60);

    let capture = Capture::begin(&region, "inside");
    assert!(region.pings(&first, &second.private_address), "ping");
    for size in ["1472", "8973"] {
        let command = format!("ping -c 3 -i 0.3 -W 2 -M do -s {size} {}", second.private_address);
        assert!(region.try_ssh(&first, &command).0, "ping of {size} bytes without fragments");
    }
    let rack = region.call("DescribeSecurityGroups", &[("GroupName.1", "rack")]).need("groupId");
    let open = [
        ("GroupId", rack.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "9000"),
        ("IpPermissions.1.ToPort", "9000"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    let _ = region.call("AuthorizeSecurityGroupIngress", &open);
    let _ = region.ssh(&second, "setsid sh -c 'sleep 60 | nc -l -p 9000 | sha256sum >/tmp/sum' >/dev/null 2>&1 &");
    std::thread::sleep(std::time::Duration::from_secs(1));
    let sent = region.ssh(
        &first,
        &format!(
            "dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null; cat /tmp/data >/dev/tcp/{}/9000; sha256sum </tmp/data",
            second.private_address
        ),
    );
    region.eventually("TCP carried 4 MiB unharmed", 20, || region.try_ssh(&second, "cat /tmp/sum").1 == sent);
    let wire = capture.end();
    let mut seen: Vec<u32> = wire.iter().filter_map(|frame| vni(frame)).collect();
    assert!(seen.len() > 20, "only {} VXLAN frames were captured", seen.len());
    seen.dedup();
    assert_eq!(seen.len(), 1, "one VPC, one VNI: {seen:?}");

    spoofs_are_dropped_and_counted(&region, &first, &second, &first_card);
    strangers_on_the_underlay_are_dropped_and_counted(&region, seen[0], &first, &second, &second_card);
    region.terminate(&[&second.id]);
    the_same_address_in_another_vpc_is_out_of_reach(&region, &first, &second.private_address, &zones[1], seen[0]);
}

fn spoofs_are_dropped_and_counted(region: &Region, first: &Instance, second: &Instance, card: &str) {
    let spoofed = || region.card_metric(card, &["drop", "spoof"]);
    let before = spoofed();
    let (net, host) = first.private_address.rsplit_once('.').expect("an address");
    let forged = format!("{net}.{}", if host == "200" { 201 } else { 200 });
    let command = format!(
        "sudo ip addr add {forged}/32 dev eth0; ping -c 2 -i 0.3 -W 1 -I {forged} {}; sudo ip addr del {forged}/32 dev eth0",
        second.private_address
    );
    let (_, output) = region.try_ssh(first, &command);
    assert!(output.contains("100% packet loss"), "a forged source address got an answer: {output}");
    let after_address = spoofed();
    assert!(after_address > before, "forged addresses were not counted: {}", region.card_metrics(card));

    let command = format!(
        "sudo sh -c 'old=$(cat /sys/class/net/eth0/address); ip link set eth0 address 02:de:ad:be:ef:01; \
         ping -c 2 -i 0.3 -W 1 {} >/tmp/forged; ip link set eth0 address $old' </dev/null; cat /tmp/forged",
        second.private_address
    );
    let mut detached = region.ssh_command(first);
    let output = detached
        .arg(format!("setsid sh -c \"{}\" >/tmp/log 2>&1 & sleep 4; cat /tmp/forged", command.replace('"', "\\\"").replace('$', "\\$")))
        .output()
        .expect("ssh");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("bytes from"), "a forged MAC address got an answer");
    assert!(spoofed() > after_address, "forged MAC addresses were not counted");
    assert!(region.pings(first, &second.private_address), "the honest address works again");
}

/// A VXLAN packet with the right VNI and a mapped inner source, from an underlay
/// address that is not the mapping's.
fn strangers_on_the_underlay_are_dropped_and_counted(region: &Region, vni: u32, first: &Instance, second: &Instance, card: &str) {
    let namespace = region.ready("wire_namespace").as_str().expect("namespace");
    let dropped = || region.card_metric(card, &["drop", "vtep"]);
    let before = dropped();
    let place = card.trim_start_matches("card-").replace('-', "");
    let index =
        region.processes().iter().filter(|process| process.kind == "card").position(|process| process.name == *card).expect("the card");
    let target = format!("10.255.0.{}", 11 + index);
    let script = format!(
        "import socket,struct\n\
         ip=struct.pack('>BBHHHBBH4s4s',0x45,0,28,1,0,64,1,0,socket.inet_aton('{}'),socket.inet_aton('{}'))\n\
         total=sum(struct.unpack('>10H',ip))\n\
         total=(total>>16)+(total&65535)\n\
         ip=ip[:10]+struct.pack('>H',~(total+(total>>16))&65535)+ip[12:]\n\
         inner=bytes.fromhex('02aaaaaaaaaa02bbbbbbbbbb0800')+ip+bytes.fromhex('0800f7ff00000000')\n\
         s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n\
         [s.sendto(struct.pack('>II',0x08000000,{vni}<<8)+inner,('{target}',4789)) for _ in range(5)]\n",
        first.private_address, second.private_address
    );
    let lines = [
        "ip link add stranger type veth peer name stranger-b".to_owned(),
        "ip link set stranger-b master underlay up".to_owned(),
        "ip addr add 10.255.0.200/24 dev stranger".to_owned(),
        // A checksum left to absent hardware would be a reason of its own to drop.
        "ethtool -K stranger tx off >/dev/null".to_owned(),
        "ip link set stranger up".to_owned(),
        "sleep 1".to_owned(),
        format!("python3 -c \"{script}\""),
        "sleep 0.5".to_owned(),
        "ip link del stranger".to_owned(),
    ];
    let status = Command::new("ip").args(["netns", "exec", namespace, "sh", "-c", &lines.join("\n")]).status().expect("sh");
    assert!(status.success());
    assert!(dropped() >= before + 5.0, "{place}: a stranger's VXLAN was not counted: {}", region.card_metrics(card));
}

fn the_same_address_in_another_vpc_is_out_of_reach(region: &Region, first: &Instance, address: &str, zone: &str, vni_of_first: u32) {
    let zone_filter = [("Filter.1.Name", "availability-zone"), ("Filter.1.Value.1", zone)];
    let block = region.call("DescribeSubnets", &zone_filter).need("cidrBlock");
    let vpc = region.call("CreateVpc", &[("CidrBlock", "172.31.0.0/16")]).need("vpcId");
    let subnet = region.call("CreateSubnet", &[("VpcId", &vpc), ("CidrBlock", &block), ("AvailabilityZone", zone)]).need("subnetId");
    let twin = region.launch(&[("SubnetId", &subnet), ("PrivateIpAddress", address), ("KeyName", "rack")]);
    assert_eq!(twin.private_address, address);
    region.eventually("the twin is up", 40, || region.console(&twin.id).contains("mini: sshd"));
    let capture = Capture::begin(region, "outside");
    assert!(!region.pings(first, address), "a guest of another VPC answered");
    for frame in capture.end() {
        assert_ne!(vni(&frame), Some(vni_of_first), "a frame left for a guest that is gone");
    }
    region.terminate(&[&first.id, &twin.id]);
}
