//! Finds libdpdk by pkg-config, compiles the shim and generates the bindings.

use std::env;
use std::error::Error;
use std::path::PathBuf;

const FUNCTIONS: &str = "rte_dev_probe|rte_dev_remove|rte_eal_(get_runtime_dir|init)|rte_eth_(dev_(adjust_nb_rx_tx_desc|close|configure|\
    get_port_by_name|info_get|set_mtu|start|stop)|macaddr_get|promiscuous_enable|rx_queue_setup|tx_queue_setup)|\
    rte_mempool_free|rte_pktmbuf_pool_create_by_ops|rte_strerror|shim_.*";

fn main() -> Result<(), Box<dyn Error>> {
    for file in ["wrapper.h", "shim.h", "shim.c"] {
        println!("cargo::rerun-if-changed={file}");
    }
    let dpdk = pkg_config::Config::new().atleast_version("22.11").probe("libdpdk")?;
    // rte_config.h comes first in every unit, and headers need SSE 4.2 on x86.
    let mut flags = vec!["-include".to_owned(), "rte_config.h".to_owned()];
    if env::var("CARGO_CFG_TARGET_ARCH")? == "x86_64" {
        flags.push("-march=corei7".to_owned());
    }

    let mut shim = cc::Build::new();
    shim.file("shim.c").includes(&dpdk.include_paths);
    for flag in &flags {
        shim.flag(flag);
    }
    shim.opt_level(2).compile("dpdk_shim");

    let include = dpdk.include_paths.iter().map(|path| format!("-I{}", path.display()));
    let bindings = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(include.chain(flags))
        .allowlist_function(FUNCTIONS)
        .allowlist_var("SHIM_.*")
        // Only ever behind pointers here.
        .opaque_type("rte_mbuf|rte_mempool|rte_device|rte_eth_(rss|vmdq|dcb|switch|fc|rxseg).*|rte_eth_rxconf|rte_eth_txconf")
        .derive_default(true)
        .layout_tests(false)
        .generate()?;
    bindings.write_to_file(PathBuf::from(env::var("OUT_DIR")?).join("bindings.rs"))?;
    Ok(())
}
