//! Who may know whom: the crate edges of the project, proved from `cargo metadata`.

use std::collections::BTreeMap;

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
const FORBIDDEN_BELOW: &[&str] = &["tokio", "tonic", "prost", "getrandom", "rand"];

/// Every crate of the project with the names of its normal dependencies.
fn crates() -> BTreeMap<String, Vec<String>> {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(hw_sim::project_root())
        .output()
        .expect("cargo metadata");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            // A normal dependency has the kind null.
            let normal = dependencies.iter().filter(|dependency| dependency["kind"].is_null());
            (text(&package["name"]), normal.map(|dependency| text(&dependency["name"])).collect())
        })
        .collect()
}

#[test]
fn crates_know_only_what_is_below_them() {
    let crates = crates();
    for (name, dependencies) in &crates {
        let (_, allowed) =
            ALLOWED.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("crate {name} has no row in this test"));
        for dependency in dependencies.iter().filter(|dependency| crates.contains_key(*dependency)) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not know {dependency}");
        }
    }
}

#[test]
fn packet_and_block_paths_know_no_runtime_no_rpc_and_no_chance() {
    let crates = crates();
    for name in ["dataplane", "storage-target"] {
        for dependency in &crates[name] {
            assert!(!FORBIDDEN_BELOW.contains(&dependency.as_str()), "{name} must not know {dependency}");
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
