//! Acceptance 9: the host has no address, no listening socket, no tenant data.
//!
//! The lab's stand-in for a PCIe function of the card is a Unix socket in the
//! slot's folder, which only this host and its card can reach. A machine binds
//! one for each of its functions, and they are the only ones that listen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use hw_sim::{Region, root_or_skip};

/// Planted in user data; must not be found on the host side.
const SECRET: &str = "planted-secret-5b1f7c";

#[test]
fn the_host_side_has_no_address_no_listening_socket_and_no_tenant_data() {
    if !root_or_skip("host") {
        return;
    }
    let region = Region::start("host", &["--zones", "1"]);
    let encoded = "IyEvYmluL3NoCmVjaG8gcGxhbnRlZC1zZWNyZXQtNWIxZjdjCg=="; // a script with SECRET in it
    let guest = region.launch(&[("UserData", encoded)]);
    region.wait_ssh(&guest, 60);
    assert!(region.ssh(&guest, "sudo cat /var/lib/user-data").contains(SECRET));
    let host = region.card_of(&guest.id).replace("card-", "host-");

    let slot = region.dir().join(host.replace("host-", "link-"));
    let mut functions = BTreeSet::new();
    let mut pids = region.pids("qemu-system");
    pids.push(region.pid(&host));
    assert_eq!(pids.len(), 2);
    for pid in pids {
        let read = |path: &str| std::fs::read_to_string(format!("/proc/{pid}/{path}")).unwrap_or_default();
        // /proc/PID/net is the network namespace of that process.
        for (table, header) in [("net/tcp", 1), ("net/udp", 1), ("net/tcp6", 1), ("net/udp6", 1), ("net/route", 1)] {
            assert!(read(table).lines().count() <= header, "{table} of {pid}: {}", read(table));
        }
        let addresses: Vec<String> = read("net/fib_trie").lines().filter(|line| line.contains("host LOCAL")).map(str::to_owned).collect();
        assert!(addresses.is_empty(), "addresses of {pid}: {addresses:?}");
        let interfaces: BTreeSet<String> =
            read("net/dev").lines().skip(2).filter_map(|line| line.split(':').next().map(|name| name.trim().to_owned())).collect();
        assert!(interfaces.iter().all(|name| name == "lo"), "interfaces of {pid}: {interfaces:?}");

        // Listening Unix sockets have SO_ACCEPTCON (10000h) in their flags; inode and path follow.
        let listening: BTreeMap<String, PathBuf> = read("net/unix")
            .lines()
            .skip(1)
            .filter(|line| line.split_whitespace().nth(3) == Some("00010000"))
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(6);
                Some((words.next()?.to_owned(), words.next().unwrap_or_default().into()))
            })
            .collect();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("fds").flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
            let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            if let Some(path) = inode.and_then(|inode| listening.get(inode)) {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let of_a_function = ["eni-", "vol-"].iter().any(|kind| name.starts_with(kind)) && name.ends_with(".sock");
                assert!(path.parent() == Some(&slot) && of_a_function, "{pid} listens on {}", path.display());
                functions.insert(path.clone());
            }
            assert!(!target.ends_with(".raw") && !target.contains("/volumes/"), "{pid} has the disk {target} open");
        }
    }
    assert_eq!(functions.len(), 2, "one network card, one disk: {functions:?}");
    let found = std::process::Command::new("grep")
        .args(["-r", "-l", "-a", SECRET])
        .arg(region.dir().join(&host))
        .arg(region.dir().join("logs").join(format!("{host}.log")))
        .output()
        .expect("grep");
    assert!(found.stdout.is_empty(), "the secret is in {}", String::from_utf8_lossy(&found.stdout));
    region.terminate(&[&guest.id]);
    let left: Vec<PathBuf> = functions.into_iter().filter(|socket| socket.exists()).collect();
    assert!(left.is_empty(), "sockets of a machine that is gone: {left:?}");
}
