//! The card's settings: one TOML file, read into one struct and checked once.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Everything that an operator sets. Paths are as written, relative ones to the working directory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the card; the DNS name in its certificate.
    pub id: String,
    /// Availability zone that it stands in.
    pub zone: String,
    /// The card's own disk: desired state, consoles, keys, volumes.
    pub state_dir: PathBuf,
    /// The PCIe slot: mailbox and sockets of the card's functions.
    pub link_dir: PathBuf,
    /// The image store.
    pub images_dir: PathBuf,
    /// Where control finds the card.
    pub listen: SocketAddr,
    /// Where `/healthz` and `/metrics` are served.
    pub metrics_listen: SocketAddr,
    /// What the card does.
    pub roles: Vec<Role>,
    /// Who may speak to it, and how it proves what it is.
    pub tls: Tls,
    /// The network between cards.
    #[serde(default)]
    pub underlay: Underlay,
    /// The network of public addresses.
    #[serde(default)]
    pub public: Public,
    /// Volumes; required by the storage role.
    pub storage: Option<Storage>,
}

/// A duty of a card.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Guests of the host under the card.
    Compute,
    /// Volumes for other cards.
    Storage,
}

/// PEM files of the region's authority and of this card.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the names say it
pub struct Tls {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What carries packets.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Nothing: guests of this card reach each other only.
    #[default]
    None,
    /// A packet socket on a kernel interface.
    Packet,
    /// A UDP socket of the kernel: underlay only, works without root.
    Udp,
    /// A wire made of two UDP sockets: public side only, works without root.
    Cable,
    /// A DPDK port.
    Dpdk,
}

/// The network between cards.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Underlay {
    /// What carries it.
    #[serde(default)]
    pub device: Device,
    /// Kernel interface, or DPDK device arguments.
    pub interface: Option<String>,
    /// Network namespace of the interface.
    pub netns: Option<PathBuf>,
    /// The card's address: its VTEP.
    pub address: Option<Ipv4Addr>,
    /// Of the on-link network.
    #[serde(default = "default_prefix_length")]
    pub prefix_length: u8,
}

/// The network of public addresses.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Public {
    /// What carries it.
    #[serde(default)]
    pub device: Device,
    /// Kernel interface, or DPDK device arguments.
    pub interface: Option<String>,
    /// Network namespace of the interface.
    pub netns: Option<PathBuf>,
    /// This end of a cable.
    pub near: Option<SocketAddrV4>,
    /// Its other end.
    pub far: Option<SocketAddrV4>,
    /// Router towards everything that is not on-link.
    pub gateway: Option<Ipv4Addr>,
    /// Of the on-link network.
    #[serde(default = "default_prefix_length")]
    pub prefix_length: u8,
}

/// Volumes of a card with the storage role.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// NVMe/TCP target, reachable by other cards.
    pub listen: SocketAddr,
    /// Sum of the sizes of all volumes.
    pub capacity_bytes: u64,
}

/// Why settings were refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum SettingsError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("understand {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: toml::de::Error,
    },
    #[error("setting `{setting}` {rule}")]
    Invalid { setting: &'static str, rule: &'static str },
}

impl Settings {
    /// Reads and checks a settings file.
    ///
    /// # Errors
    /// A sentence that names the file, and the setting where one is wrong.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.into(), source })?;
        let settings: Self = toml::from_str(&text).map_err(|source| SettingsError::Parse { path: path.into(), source })?;
        settings.check()?;
        Ok(settings)
    }

    /// Whether the card has a role.
    #[must_use]
    pub fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// The NQN by which the card connects to volumes.
    #[must_use]
    pub fn initiator_nqn(&self) -> String {
        format!("nqn.2026-11.cardinal:card:{}", self.id)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let require = |holds: bool, setting, rule| if holds { Ok(()) } else { Err(SettingsError::Invalid { setting, rule }) };
        let name =
            |text: &str| (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        require(name(&self.id), "id", "is 1 to 63 characters of a-z, 0-9 and -")?;
        require(name(&self.zone), "zone", "is 1 to 63 characters of a-z, 0-9 and -")?;
        require(!self.roles.is_empty(), "roles", "names at least one of compute, storage")?;
        require(self.has(Role::Storage) == self.storage.is_some(), "storage", "is there exactly when roles has storage")?;
        if let Some(storage) = &self.storage {
            require(!storage.listen.ip().is_unspecified(), "storage.listen", "is the address that other cards connect to, so not 0.0.0.0")?;
            require(storage.listen.is_ipv4(), "storage.listen", "is an IPv4 address")?;
        }
        let underlay = &self.underlay;
        require(underlay.device != Device::Cable, "underlay.device", "is packet, udp, dpdk or none")?;
        require(underlay.device == Device::None || underlay.address.is_some(), "underlay.address", "is required by the device")?;
        require((1..=32).contains(&underlay.prefix_length), "underlay.prefix_length", "is 1 to 32")?;
        let named = !matches!(underlay.device, Device::Packet | Device::Dpdk) || underlay.interface.is_some();
        require(named, "underlay.interface", "is required by the device")?;
        let public = &self.public;
        require(public.device != Device::Udp, "public.device", "is packet, cable, dpdk or none")?;
        let named = !matches!(public.device, Device::Packet | Device::Dpdk) || public.interface.is_some();
        require(named, "public.interface", "is required by the device")?;
        let ends = public.near.is_some() && public.far.is_some();
        require(ends == (public.device == Device::Cable), "public.near", "is there, with public.far, exactly when the device is cable")?;
        require(public.device == Device::None || public.gateway.is_some(), "public.gateway", "is required by the device")?;
        require((1..=32).contains(&public.prefix_length), "public.prefix_length", "is 1 to 32")?;
        let dpdk = [underlay.device, public.device].contains(&Device::Dpdk);
        require(
            !dpdk || cfg!(feature = "dpdk"),
            "device",
            "is \"dpdk\", and this nitro-card was built without DPDK: build it with --features dpdk or choose \"packet\"",
        )
    }
}

impl Default for Underlay {
    fn default() -> Self {
        Self { device: Device::None, interface: None, netns: None, address: None, prefix_length: default_prefix_length() }
    }
}

impl Default for Public {
    fn default() -> Self {
        Self {
            device: Device::None,
            interface: None,
            netns: None,
            near: None,
            far: None,
            gateway: None,
            prefix_length: default_prefix_length(),
        }
    }
}

fn default_prefix_length() -> u8 {
    24
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        id = "card-us-east-1a-1"
        zone = "us-east-1a"
        state_dir = "state"
        link_dir = "link"
        images_dir = "images"
        listen = "127.0.0.1:7101"
        metrics_listen = "127.0.0.1:7201"
        roles = ["compute", "storage"]
        [tls]
        authority = "ca.pem"
        certificate = "card.pem"
        key = "card.key"
        [underlay]
        device = "udp"
        address = "127.0.0.11"
        [storage]
        listen = "127.0.0.1:4421"
        capacity_bytes = 107374182400
    "#;

    fn check(text: &str) -> Result<(), String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map_err(|error| error.to_string())
    }

    #[test]
    fn complete_settings_are_accepted() {
        check(GOOD).unwrap();
    }

    #[test]
    fn unknown_and_contradictory_settings_are_named() {
        for (from, to, word) in [
            ("[tls]", "colour = 1\n[tls]", "colour"),
            ("device = \"udp\"", "device = \"avian\"", "avian"),
            ("device = \"udp\"", "device = \"packet\"", "underlay.interface"),
            ("address = \"127.0.0.11\"", "", "underlay.address"),
            ("[\"compute\", \"storage\"]", "[\"compute\"]", "storage"),
            ("[\"compute\", \"storage\"]", "[]", "roles"),
            ("\"card-us-east-1a-1\"", "\"../x\"", "id"),
            ("127.0.0.1:4421", "0.0.0.0:4421", "storage.listen"),
            ("[storage]", "[public]\ndevice = \"udp\"\n[storage]", "public.device"),
            ("[storage]", "[public]\ndevice = \"cable\"\nnear = \"127.0.0.1:9\"\n[storage]", "public.near"),
            ("device = \"udp\"", "device = \"cable\"", "underlay.device"),
        ] {
            let changed = GOOD.replacen(from, to, 1);
            assert_ne!(changed, GOOD);
            let refusal = check(&changed).unwrap_err();
            assert!(refusal.contains(word), "{refusal:?} does not name {word}");
        }
    }

    #[cfg(not(feature = "dpdk"))]
    #[test]
    fn dpdk_is_refused_by_a_build_without_it() {
        let changed = GOOD.replace("device = \"udp\"", "device = \"dpdk\"\ninterface = \"net_af_packet0\"");
        assert!(check(&changed).unwrap_err().contains("--features dpdk"));
    }
}
