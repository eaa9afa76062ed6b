//! Raw bindings to Debian's libdpdk (22.11), for `dataplane::io::dpdk` only.
//!
//! Generated at build time for the functions in `build.rs`. DPDK's own manual is
//! their documentation; `shim.h` lists the inline functions that got a symbol.

#![allow(missing_docs, unsafe_code, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(clippy::all, clippy::undocumented_unsafe_blocks, clippy::multiple_unsafe_ops_per_block)]
#![allow(clippy::indexing_slicing, clippy::cast_possible_truncation)]
#![allow(rustdoc::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
