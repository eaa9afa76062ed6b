//! QEMU's command line for one machine.
//!
//! The machine type is `pc`: within the noise it boots as fast as q35, its one
//! flat bus takes and gives back functions in any slot without a port reserved
//! for each, and slot 5 makes the first network card `ens5`, as on EC2.
//!
//! | slot 3 | 4         | 5 .. 7        | 8 .. 30     |
//! | rng    | boot disk | network cards | other disks |
//!
//! A kind that has filled its slots goes on to any free one.
//!
//! A function is a vhost-user socket that QEMU binds and the card connects to:
//! a card that comes back is there within milliseconds, where QEMU as the one
//! who connects would look for it once a second.

use super::{Boot, Function, FunctionKind, Launch};
use crate::partition::PAGE_BYTES;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;

const RNG_SLOT: u8 = 3;
const SLOTS: std::ops::RangeInclusive<u8> = RNG_SLOT + 1..=30;
/// Translated code of one guest: QEMU's default would let each take 1 GiB.
const TRANSLATION_MIB: u32 = 256;

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Translation in software.
    Tcg,
}

/// A free slot for a function of this kind, or none.
pub(super) fn slot(kind: FunctionKind, used: &BTreeMap<String, u8>) -> Option<u8> {
    let first = match kind {
        FunctionKind::Block { boot: true } => 4,
        FunctionKind::Net { .. } => 5,
        FunctionKind::Block { boot: false } => 8,
    };
    (first..=*SLOTS.end()).chain(*SLOTS.start()..first).find(|slot| !used.values().any(|used| used == slot))
}

/// All arguments. `slots` says where each function of the spec goes.
pub(super) fn arguments(launch: &Launch<'_>, accelerator: Accelerator, slots: &BTreeMap<String, u8>) -> Vec<OsString> {
    let Launch { spec, folder, .. } = launch;
    let memory_bytes = spec.memory_bytes.next_multiple_of(PAGE_BYTES);
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm".to_owned(), "host"),
        Accelerator::Tcg => (format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"), "max"),
    };
    let mut line = Line(Vec::new());
    line.flags("-nodefaults -no-user-config -display none -msg timestamp=on -rtc base=utc");
    // Without networks and disks of its own QEMU needs neither new processes nor privileges.
    line.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny");
    line.pair("-name", &format!("guest={},debug-threads=on", spec.id));
    line.pair("-machine", "pc,memory-backend=ram,dump-guest-core=off,vmport=off,smm=off");
    line.pair("-accel", &accel);
    line.pair("-cpu", cpu);
    line.pair("-smp", &format!("cpus={0},sockets=1,cores={0},threads=1", spec.vcpus));
    line.pair("-m", &format!("{}k", memory_bytes / 1024));
    line.pair("-object", &format!("memory-backend-memfd,id=ram,size={memory_bytes},share=on"));
    // A guest that turns itself off leaves its machine paused, so that an agent
    // that was away can tell that from a crash.
    line.pair("-action", "shutdown=pause,reboot=reset,panic=none");
    line.pair("-chardev", &format!("pipe,id=qmp,path={}", quoted(&folder.join("qmp"))));
    line.pair("-mon", "chardev=qmp,mode=control");
    line.pair("-chardev", &format!("pipe,id=serial,path={}", quoted(&folder.join("serial"))));
    line.pair("-serial", "chardev:serial");
    line.pair("-object", "rng-random,id=rng,filename=/dev/urandom");
    line.pair("-device", &format!("virtio-rng-pci,rng=rng,addr={RNG_SLOT:#x}"));
    smbios(&mut line, launch);
    if let Boot::Kernel { kernel, initrd, command_line } = &spec.boot {
        line.path("-kernel", kernel);
        if let Some(initrd) = initrd {
            line.path("-initrd", initrd);
        }
        line.pair("-append", command_line);
    }
    for function in &spec.functions {
        let plug = Plug::new(function, slots.get(&function.id).copied().unwrap_or_default(), accelerator);
        line.pair("-chardev", &format!("socket,id={},path={},server=on,wait=off", plug.chardev, quoted(&function.socket)));
        if let Some(netdev) = &plug.netdev {
            line.pair("-netdev", &options(netdev));
        }
        line.pair("-device", &options(&plug.device));
    }
    line.0
}

/// The objects of QEMU behind one function, as its monitor takes them.
#[derive(Clone)]
pub(super) struct Plug {
    /// Id of the socket.
    pub(super) chardev: String,
    /// The socket's other properties.
    pub(super) backend: Value,
    /// Arguments of `netdev_add`.
    pub(super) netdev: Option<Map<String, Value>>,
    /// Arguments of `device_add`.
    pub(super) device: Map<String, Value>,
}

impl Plug {
    pub(super) fn new(function: &Function, slot: u8, accelerator: Accelerator) -> Self {
        let id = &function.id;
        let chardev = chardev_id(id);
        let backend = json!({
            "type": "socket",
            "data": { "addr": { "type": "unix", "data": { "path": function.socket } }, "server": true, "wait": false },
        });
        let mut device = object(json!({ "id": device_id(id), "bus": "pci.0", "addr": format!("{slot:#x}") }));
        let netdev = match function.kind {
            FunctionKind::Net { mac, mtu } => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                device.extend(object(json!({ "driver": "virtio-net-pci", "netdev": netdev_id(id), "mac": mac, "romfile": "" })));
                // A guest that is told of its link sees it go down with its card's process,
                // forgets its neighbours and asks for them a second too late.
                device.insert("status".into(), json!(false));
                if mtu != 0 {
                    device.insert("host_mtu".into(), json!(mtu));
                }
                // QEMU 7.2 falls over MSI-X of vhost-user-net without KVM: use INTx there.
                if accelerator == Accelerator::Tcg {
                    device.insert("vectors".into(), json!(0));
                }
                Some(object(json!({ "type": "vhost-user", "id": netdev_id(id), "chardev": chardev })))
            }
            FunctionKind::Block { boot } => {
                device.extend(object(json!({ "driver": "vhost-user-blk-pci", "chardev": chardev, "num-queues": 1 })));
                if boot {
                    // QEMU gives 0 to the kernel of a direct boot.
                    device.insert("bootindex".into(), json!(1));
                }
                None
            }
        };
        Self { chardev, backend, netdev, device }
    }
}

/// QEMU's name of the function's device.
pub(super) fn device_id(function: &str) -> String {
    format!("f-{function}")
}

/// The function of a device's name; `None` for devices that are no functions.
pub(super) fn function_id(device: &str) -> Option<&str> {
    device.strip_prefix("f-")
}

/// QEMU's name of the function's socket.
pub(super) fn chardev_id(function: &str) -> String {
    format!("c-{function}")
}

/// QEMU's name of the function's network back end.
pub(super) fn netdev_id(function: &str) -> String {
    format!("n-{function}")
}

/// What tells a machine's process from all others.
pub(super) fn mark(folder: &Path) -> String {
    format!("pipe,id=qmp,path={}", quoted(&folder.join("qmp")))
}

fn smbios(line: &mut Line, launch: &Launch<'_>) {
    let smbios = &launch.spec.smbios;
    let mut table = |kind: u8, fields: &[(&str, &str)]| {
        let mut text = format!("type={kind}");
        for (name, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
            // Writing to a String cannot fail.
            let _ = write!(text, ",{name}={}", value.replace(',', ",,"));
        }
        line.pair("-smbios", &text);
    };
    let (vendor, product) = (smbios.vendor.as_str(), smbios.product.as_str());
    table(0, &[("vendor", vendor), ("version", "1.0")]);
    table(1, &[("manufacturer", vendor), ("product", product), ("serial", &smbios.serial), ("uuid", &smbios.uuid)]);
    table(2, &[("manufacturer", vendor), ("asset", &smbios.asset_tag)]);
    table(3, &[("manufacturer", vendor), ("asset", vendor)]);
}

fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// `-device` and `-netdev` take JSON as it is.
fn options(map: &Map<String, Value>) -> String {
    Value::Object(map.clone()).to_string()
}

struct Line(Vec<OsString>);

impl Line {
    fn flags(&mut self, flags: &str) {
        self.0.extend(flags.split(' ').map(OsString::from));
    }

    fn pair(&mut self, option: &str, value: &str) {
        self.0.extend([option.into(), value.into()]);
    }

    fn path(&mut self, option: &str, path: &Path) {
        self.0.extend([option.into(), path.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_slots_and_then_any_free_one() {
        let mut used = BTreeMap::new();
        let mut take = |kind, count: usize| {
            let taken: Vec<u8> = (0..count)
                .map_while(|_| {
                    let slot = slot(kind, &used)?;
                    used.insert(slot.to_string(), slot);
                    Some(slot)
                })
                .collect();
            taken
        };
        let net = FunctionKind::Net { mac: [0; 6], mtu: 0 };
        assert_eq!(take(net, 2), [5, 6]);
        assert_eq!(take(FunctionKind::Block { boot: true }, 1), [4]);
        assert_eq!(take(FunctionKind::Block { boot: false }, 2), [8, 9]);
        assert_eq!(take(net, 3), [7, 10, 11]);
        assert_eq!(take(FunctionKind::Block { boot: false }, 30).len(), super::super::FUNCTIONS_MAX + 1 - 8);
    }
}
