//! A region of an ordinary user: no root, no namespaces, the same packets and guests.

use std::os::unix::fs::MetadataExt;

use hw_sim::{Instance, Region, root_or_skip};

/// `nobody` on any Debian: ssh wants a user with a name.
const USER: u32 = 65_534;

#[test]
fn an_ordinary_user_gets_guests_that_ssh_reaches_and_security_groups_guard() {
    // Root is only needed to become somebody else.
    if !root_or_skip("rootless") {
        return;
    }
    let region = Region::start_as(USER, "rootless", &["--zones", "1", "--hosts-per-zone", "2"]);
    let home = region.dir().parent().expect("a folder of the user").to_owned();
    for pid in region.pids("") {
        assert_eq!(std::fs::metadata(format!("/proc/{pid}")).expect("a process").uid(), USER);
    }
    // Two guests that do not fit on one card's host: 8 cores each.
    let first = region.launch(&[("InstanceType", "c5.xlarge")]);
    let second = region.launch(&[("InstanceType", "c5.2xlarge")]);
    assert_ne!(region.card_of(&first.id), region.card_of(&second.id));
    let took = region.wait_ssh(&first, 120);
    println!("ssh through the user's own internet after {took:.1} s");

    let name = rack(&region, "ssh", &[&first.id, "hostname"]);
    assert_eq!(name, format!("ip-{}", first.private_address.replace('.', "-")));
    region.wait_ssh(&second, 120);
    assert!(region.pings(&first, &second.private_address), "no ping between two cards over loopback UDP");
    assert!(region.pings(&first, "203.0.113.10"), "no ping to a host on the internet");
    a_closed_group_cuts(&region, &first);

    let refused = region.rack(USER, "exec", &["--", "true"]);
    let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && reason.contains("without root") && reason.contains("http://127.0.0.1:"), "{reason}");
    garbage_does_not_end_the_internet(&region, &first);

    region.terminate(&[&first.id, &second.id]);
    assert!(region.pids("qemu-system").is_empty());
    drop(region);
    assert!(!home.join("region").exists(), "the region left files");
    std::fs::remove_dir_all(home).expect("copies");
}

fn rack(region: &Region, command: &str, arguments: &[&str]) -> String {
    let output = region.rack(USER, command, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "rack {command}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Port 22 of the group `rack` is closed and opened again.
fn a_closed_group_cuts(region: &Region, guest: &Instance) {
    let rule = [
        ("GroupName", "rack"),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    let card = region.card_of(&guest.id);
    let dropped = || region.card_metric(&card, &["dataplane_drops_total", "denied_ingress"]);
    let before = dropped();
    let _ = region.call("RevokeSecurityGroupIngress", &rule);
    region.eventually("the group is closed", 10, || !region.try_ssh(guest, "true").0);
    assert!(dropped() > before, "nothing was counted as dropped by the group");
    let _ = region.call("AuthorizeSecurityGroupIngress", &rule);
    region.wait_ssh(guest, 20);
}

/// What is no CONNECT is refused, and the next connection passes.
fn garbage_does_not_end_the_internet(region: &Region, guest: &Instance) {
    use std::io::{Read, Write};
    let proxy = region.ready("internet_proxy").as_str().expect("a proxy");
    for request in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"CONNECT nowhere HTTP/1.1\r\n\r\n", &[0xff; 8192], b""] {
        let mut stream = std::net::TcpStream::connect(proxy).expect("the proxy");
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("timeout");
        let _ = stream.write_all(request);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    }
    region.wait_ssh(guest, 20);
}
