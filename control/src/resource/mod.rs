//! One file for each noun of the API: its rows are in [`crate::model`], its
//! operations are the functions named after EC2's actions in snake case.
//!
//! An operation takes the call and the decoded request, reads and writes only
//! through the call's transaction, and returns the shape of the answer. It
//! checks everything before it changes anything that it could not undo:
//! nothing, since an error undoes the transaction. Every lookup is keyed by the
//! account that asks, so a foreign id is like an unknown one.

pub mod account;
pub mod address;
pub mod client_token;
pub mod dhcp_options;
pub mod filter;
pub mod id;
pub mod image;
pub mod instance;
pub mod instance_type;
pub mod internet_gateway;
pub mod key_pair;
pub mod nat_gateway;
pub mod network_acl;
pub mod network_acl_entry;
pub mod network_interface;
pub mod prefix_list;
pub mod region;
pub mod route_table;
pub mod security_group;
pub mod security_group_rule;
pub mod stale_security_group;
pub mod subnet;
pub mod tag;
pub mod volume;
pub mod vpc;
pub mod vpc_peering_connection;

#[cfg(test)]
mod fixture;
