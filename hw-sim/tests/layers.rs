//! Who may know whom: the crate edges of the project, proved from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};

/// Each crate with all that it may depend on inside the project.
const ALLOWED: &[(&str, &[&str])] = &[
    ("rate-limit", &[]),
    ("sigv4", &[]),
    ("card-proto", &[]),
    ("dpdk-sys", &[]),
    ("generator", &[]),
    ("rack", &[]),
    ("dataplane", &["rate-limit", "dpdk-sys"]),
    ("storage-target", &["rate-limit"]),
    ("thin-hv", &["card-proto"]),
    ("cli", &["sigv4"]),
    ("nitro-card", &["card-proto", "dataplane", "storage-target", "rate-limit"]),
    ("control", &["card-proto", "sigv4", "rate-limit"]),
    ("hw-sim", &["control", "nitro-card", "thin-hv", "dataplane", "storage-target"]),
    ("perf", &["hw-sim", "dataplane", "storage-target", "sigv4"]),
];

/// What the packet and block paths must not know, by crate name.
const FORBIDDEN_BELOW: &[&str] = &["tokio", "tonic", "prost", "serde", "getrandom", "rand"];

fn metadata() -> cargo_metadata::Metadata {
    cargo_metadata::MetadataCommand::new()
        .manifest_path(hw_sim::project_root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata")
}

#[test]
fn crates_know_only_what_is_below_them() {
    let metadata = metadata();
    let members: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let allowed: BTreeMap<&str, BTreeSet<&str>> = ALLOWED.iter().map(|(name, edges)| (*name, edges.iter().copied().collect())).collect();
    for package in &metadata.packages {
        let edges = allowed.get(package.name.as_str()).unwrap_or_else(|| panic!("crate {} has no row in this test", package.name));
        for dependency in package.dependencies.iter().filter(|dependency| dependency.kind == cargo_metadata::DependencyKind::Normal) {
            let name = dependency.name.as_str();
            assert!(!members.contains(name) || edges.contains(name), "{} must not know {name}", package.name);
        }
    }
}

#[test]
fn packet_and_block_paths_know_no_runtime_no_wire_format_and_no_chance() {
    for package in metadata().packages.iter().filter(|package| ["dataplane", "storage-target"].contains(&package.name.as_str())) {
        for dependency in package.dependencies.iter().filter(|dependency| dependency.kind == cargo_metadata::DependencyKind::Normal) {
            assert!(!FORBIDDEN_BELOW.contains(&dependency.name.as_str()), "{} must not know {}", package.name, dependency.name);
        }
    }
}

#[test]
fn only_one_file_of_control_names_the_card_client() {
    let mut naming = Vec::new();
    let mut folders = vec![hw_sim::project_root().join("control/src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if std::fs::read_to_string(&path).is_ok_and(|text| text.contains("card_client")) {
                naming.push(path.file_name().unwrap().to_string_lossy().into_owned());
            }
        }
    }
    assert_eq!(naming, ["cards.rs"]);
}

#[test]
fn the_seven_folders_of_the_design_stand_at_the_root() {
    for name in [
        "nitro-card",
        "thin-hv",
        "dataplane",
        "storage-target",
        "control",
        "hw-sim",
        "perf",
        "Cargo.toml",
        "Cargo.lock",
        "README.md",
        "LICENSE",
    ] {
        assert!(hw_sim::project_root().join(name).exists(), "{name} is missing");
    }
}
