//! Settings of the agent: one TOML file, read once and checked once.

use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What the file may say.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The folder that stands for the PCIe link to the card.
    pub link_dir: PathBuf,
    /// Where the agent keeps what a restart of it has to find; best in memory.
    pub run_dir: PathBuf,
    /// What runs the guests.
    #[serde(default)]
    pub machine: MachineKind,
    /// Cores to hand out instead of the real ones: core i is real CPU i modulo their number.
    pub cores: Option<u32>,
    /// Memory to hand out instead of the real memory, in bytes.
    pub memory_bytes: Option<u64>,
}

/// The kinds of machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// QEMU, with hardware virtualisation where a probe finds it.
    #[default]
    Auto,
    /// As `Auto`.
    Qemu,
    /// A state machine without a guest.
    Sim,
    /// Our own VMM, which this build does not have.
    Kvm,
}

/// Why the settings are no good.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum SettingsError {
    #[error("settings file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("settings file {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("setting {field} {rule}")]
    Invalid { field: &'static str, rule: &'static str },
}

impl Settings {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`SettingsError`], which names the file and the line or the field.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.into(), source })?;
        let settings: Self =
            toml::from_str(&text).map_err(|source| SettingsError::Parse { path: path.into(), source: Box::new(source) })?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let invalid = |field, rule| Err(SettingsError::Invalid { field, rule });
        match self {
            _ if !self.link_dir.is_absolute() => invalid("link_dir", "is an absolute path"),
            _ if !self.run_dir.is_absolute() => invalid("run_dir", "is an absolute path"),
            Self { machine: MachineKind::Kvm, .. } => invalid("machine", "kvm is not in this build: say auto, qemu or sim"),
            Self { cores: Some(0), .. } => invalid("cores", "is at least 1"),
            Self { cores: Some(65_536..), .. } => invalid("cores", "is at most 65535"),
            Self { memory_bytes: Some(bytes), .. } if *bytes < crate::partition::PAGE_BYTES => invalid("memory_bytes", "is at least 2 MiB"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map_err(|error| error.to_string())?;
        Ok(settings)
    }

    #[test]
    fn the_real_machine_is_the_default() {
        let settings = parse("link_dir = '/l'\nrun_dir = '/r'").unwrap();
        assert_eq!((settings.machine, settings.cores, settings.memory_bytes), (MachineKind::Auto, None, None));
    }

    #[test]
    fn each_wrong_setting_is_named() {
        let check = |line: &str, expected: &str| {
            let error = parse(&format!("link_dir = '/l'\nrun_dir = '/r'\n{line}")).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check("machine = 'kvm'", "kvm is not in this build");
        check("machine = 'xen'", "unknown variant `xen`");
        check("cores = 0", "cores is at least 1");
        check("memory_bytes = 5", "memory_bytes is at least");
        check("listen = '0.0.0.0:1'", "unknown field `listen`");
        assert!(parse("link_dir = 'l'\nrun_dir = '/r'").unwrap_err().contains("link_dir is an absolute path"));
    }
}
