//! The settings of the daemon: one TOML file, read into one struct and checked once.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `control.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `us-east-1`: part of every signature, zone and ARN.
    pub region: String,
    /// Where tenants' requests arrive.
    pub listen: SocketAddr,
    /// Rows and the operator's socket.
    pub state_dir: PathBuf,
    /// Manifests of the public images.
    pub images_dir: PathBuf,
    /// Public addresses to give away, `198.51.100.16-198.51.100.250`.
    #[serde(deserialize_with = "pool")]
    pub public_pool: RangeInclusive<Ipv4Addr>,
    /// Names of the zones, `us-east-1a` and on.
    pub zones: Vec<String>,
    /// Requests beyond the rates of EC2 are refused, see [`crate::throttle`].
    #[serde(default)]
    pub throttle: bool,
    /// The certificate that cards know us by.
    pub tls: Tls,
    /// The cards of the region.
    #[serde(default)]
    pub cards: Vec<Card>,
}

/// PEM files. The certificate's DNS name is `control`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificate of the region's authority.
    pub authority: PathBuf,
    /// Our certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A card that belongs to the region.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// The DNS name of the card's certificate.
    pub id: String,
    /// Where its gRPC server listens.
    pub address: SocketAddr,
}

/// Why settings are not usable.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum SettingsError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not valid")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("{field}: {rule}")]
    Check { field: &'static str, rule: String },
}

impl Settings {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        let settings: Self =
            toml::from_str(&text).map_err(|source| SettingsError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let refuse = |field, rule: String| Err(SettingsError::Check { field, rule });
        if self.region.is_empty() {
            return refuse("region", "is empty".to_owned());
        }
        if self.zones.is_empty() {
            return refuse("zones", "a region has at least one".to_owned());
        }
        if let Some(zone) = self.zones.iter().find(|zone| !is_zone_of(zone, &self.region)) {
            return refuse("zones", format!("{zone} is not {} and a letter", self.region));
        }
        if self.zones.iter().collect::<BTreeSet<_>>().len() != self.zones.len() {
            return refuse("zones", "one is named twice".to_owned());
        }
        if self.cards.iter().map(|card| &card.id).collect::<BTreeSet<_>>().len() != self.cards.len() {
            return refuse("cards", "one id is named twice".to_owned());
        }
        if self.public_pool.is_empty() {
            return refuse("public_pool", "its first address lies behind its last".to_owned());
        }
        for (field, file) in
            [("tls.authority", &self.tls.authority), ("tls.certificate", &self.tls.certificate), ("tls.key", &self.tls.key)]
        {
            if !file.is_file() {
                return refuse(field, format!("there is no file {}", file.display()));
            }
        }
        Ok(())
    }
}

fn is_zone_of(zone: &str, region: &str) -> bool {
    zone.strip_prefix(region).is_some_and(|letter| letter.len() == 1 && letter.bytes().all(|byte| byte.is_ascii_lowercase()))
}

fn pool<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<RangeInclusive<Ipv4Addr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let ends = text.split_once('-').and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)));
    let (first, last) = ends.ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not FIRST-LAST")))?;
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        region = "us-east-1"
        listen = "127.0.0.1:8080"
        state_dir = "state"
        images_dir = "images"
        public_pool = "198.51.100.16-198.51.100.250"
        zones = ["us-east-1a", "us-east-1b"]
        [tls]
        authority = "Cargo.toml"
        certificate = "Cargo.toml"
        key = "Cargo.toml"
        [[cards]]
        id = "card-us-east-1a-1"
        address = "127.0.0.1:7101"
    "#;

    fn check(from: &str, to: &str) -> Result<(), String> {
        assert!(FILE.contains(from));
        let settings: Settings = toml::from_str(&FILE.replace(from, to)).map_err(|error| error.to_string())?;
        settings.check().map_err(|error| error.to_string())
    }

    #[test]
    fn settings_are_read_and_wrong_ones_named() {
        assert_eq!(check("region", "region"), Ok(()));
        assert_eq!(check("region =", "throttle = true\nregion ="), Ok(()));
        for (from, to, message) in [
            ("us-east-1b", "us-east-1a", "zones: one is named twice"),
            ("us-east-1b", "us-west-1b", "zones: us-west-1b is not us-east-1 and a letter"),
            ("100.16-", "100.251-", "public_pool: its first address lies behind its last"),
            ("100.16-", "100.16 ", "is not FIRST-LAST"),
            ("key = \"Cargo", "key = \"Cargo-", "tls.key: there is no file Cargo-.toml"),
            ("listen", "lisen", "unknown field `lisen`"),
            ("region =", "throttle = \"on\"\nregion =", "invalid type: string \"on\", expected a boolean"),
        ] {
            let error = check(from, to).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
