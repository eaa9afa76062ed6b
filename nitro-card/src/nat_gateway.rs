//! A NAT gateway that this card is for a VPC. It lives in the packet path only.

use std::net::Ipv4Addr;

use dataplane::{Acl, Mac, NatGatewayConfig, NatGatewayId, Prefix, Route, Vni};

use crate::object::Id;

/// A desired NAT gateway.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct NatGateway {
    pub id: Id,
    pub generation: u64,
    pub vni: Vni,
    pub mac: Mac,
    pub private_ipv4: Ipv4Addr,
    pub subnet: Prefix,
    pub vpc_prefixes: Vec<Prefix>,
    pub routes: Vec<Route>,
    /// Of its subnet.
    pub acl: Option<Acl>,
    /// One to eight.
    pub public_ipv4: Vec<Ipv4Addr>,
}

impl NatGateway {
    /// The gateway as the packet path takes it.
    #[must_use]
    pub fn config(&self, id: NatGatewayId) -> NatGatewayConfig {
        NatGatewayConfig {
            id,
            vni: self.vni,
            mac: self.mac,
            ipv4: self.private_ipv4,
            subnet: self.subnet,
            vpc_prefixes: self.vpc_prefixes.clone(),
            routes: self.routes.clone(),
            acl: self.acl.clone(),
            public: self.public_ipv4.clone(),
        }
    }
}
