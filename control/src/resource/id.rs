//! Resource ids: a prefix, a dash, and 8 (old) or 17 (current) lower-case hexadecimal digits.
//!
//! EC2 spells the error codes of its nouns without a rule (`InvalidVpcID.Malformed`, but `InvalidRouteTableId.Malformed`), and clients
//! compare them to the letter, so they stand in one table here. A well-formed id of another account is answered like an unknown one:
//! a lookup is always by account and id, and [`Noun::not_found`] is the only answer to a miss.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::ApiError;
use crate::world::{Call, Region, Row};

/// A kind of resource: how its ids look, and what EC2 answers about them.
#[derive(Debug, PartialEq, Eq)]
pub struct Noun {
    /// What stands before the dash.
    pub prefix: &'static str,
    /// The name of the kind in tags, tag specifications and ARNs.
    pub resource_type: &'static str,
    malformed: &'static str,
    not_found: &'static str,
    /// The sentence of the `NotFound` answer, with `{}` for the id.
    sentence: &'static str,
}

const fn noun(
    prefix: &'static str,
    resource_type: &'static str,
    malformed: &'static str,
    not_found: &'static str,
    sentence: &'static str,
) -> Noun {
    Noun { prefix, resource_type, malformed, not_found, sentence }
}

/// Virtual private clouds.
pub const VPC: Noun = noun("vpc", "vpc", "InvalidVpcID.Malformed", "InvalidVpcID.NotFound", "The vpc ID '{}' does not exist");
/// Subnets.
pub const SUBNET: Noun =
    noun("subnet", "subnet", "InvalidSubnetID.Malformed", "InvalidSubnetID.NotFound", "The subnet ID '{}' does not exist");
/// DHCP option sets.
pub const DHCP_OPTIONS: Noun =
    noun("dopt", "dhcp-options", "InvalidDhcpOptionsId.Malformed", "InvalidDhcpOptionID.NotFound", "The dhcpOption ID '{}' does not exist");
/// Internet gateways.
pub const INTERNET_GATEWAY: Noun = noun(
    "igw",
    "internet-gateway",
    "InvalidInternetGatewayId.Malformed",
    "InvalidInternetGatewayID.NotFound",
    "The internetGateway ID '{}' does not exist",
);
/// Route tables.
pub const ROUTE_TABLE: Noun =
    noun("rtb", "route-table", "InvalidRouteTableId.Malformed", "InvalidRouteTableID.NotFound", "The routeTable ID '{}' does not exist");
/// The association of a route table with a subnet; it carries no tags.
pub const ROUTE_TABLE_ASSOCIATION: Noun = noun(
    "rtbassoc",
    "route-table-association",
    "InvalidAssociationID.NotFound",
    "InvalidAssociationID.NotFound",
    "The association ID '{}' does not exist",
);
/// Network ACLs.
pub const NETWORK_ACL: Noun =
    noun("acl", "network-acl", "InvalidNetworkAclId.Malformed", "InvalidNetworkAclID.NotFound", "The networkAcl ID '{}' does not exist");
/// The association of a network ACL with a subnet; it carries no tags.
pub const NETWORK_ACL_ASSOCIATION: Noun = noun(
    "aclassoc",
    "network-acl-association",
    "InvalidAssociationID.NotFound",
    "InvalidAssociationID.NotFound",
    "The association ID '{}' does not exist",
);
/// NAT gateways.
pub const NAT_GATEWAY: Noun = noun("nat", "natgateway", "NatGatewayMalformed", "NatGatewayNotFound", "The Nat Gateway {} was not found");
/// VPC peering connections.
pub const VPC_PEERING_CONNECTION: Noun = noun(
    "pcx",
    "vpc-peering-connection",
    "InvalidVpcPeeringConnectionId.Malformed",
    "InvalidVpcPeeringConnectionID.NotFound",
    "The vpcPeeringConnection ID '{}' does not exist",
);
/// Security groups.
pub const SECURITY_GROUP: Noun =
    noun("sg", "security-group", "InvalidGroupId.Malformed", "InvalidGroup.NotFound", "The security group '{}' does not exist");
/// Rules of security groups.
pub const SECURITY_GROUP_RULE: Noun = noun(
    "sgr",
    "security-group-rule",
    "InvalidSecurityGroupRuleId.Malformed",
    "InvalidSecurityGroupRuleId.NotFound",
    "The security group rule ID '{}' does not exist",
);
/// Network interfaces.
pub const NETWORK_INTERFACE: Noun = noun(
    "eni",
    "network-interface",
    "InvalidNetworkInterfaceId.Malformed",
    "InvalidNetworkInterfaceID.NotFound",
    "The networkInterface ID '{}' does not exist",
);
/// The attachment of a network interface to an instance; it carries no tags.
pub const NETWORK_INTERFACE_ATTACHMENT: Noun = noun(
    "eni-attach",
    "network-interface-attachment",
    "InvalidNetworkInterfaceAttachmentId.Malformed",
    "InvalidAttachmentID.NotFound",
    "The attachment ID '{}' does not exist",
);
/// Elastic IP addresses; EC2 has no code for a malformed id of theirs.
pub const ADDRESS: Noun =
    noun("eipalloc", "elastic-ip", "InvalidAllocationID.NotFound", "InvalidAllocationID.NotFound", "The allocation ID '{}' does not exist");
/// The association of an Elastic IP address with a network interface.
pub const ADDRESS_ASSOCIATION: Noun = noun(
    "eipassoc",
    "elastic-ip-association",
    "InvalidAssociationID.NotFound",
    "InvalidAssociationID.NotFound",
    "The association ID '{}' does not exist",
);
/// Key pairs.
pub const KEY_PAIR: Noun =
    noun("key", "key-pair", "InvalidKeyPair.NotFound", "InvalidKeyPair.NotFound", "The key pair ID '{}' does not exist");
/// Instances.
pub const INSTANCE: Noun =
    noun("i", "instance", "InvalidInstanceID.Malformed", "InvalidInstanceID.NotFound", "The instance ID '{}' does not exist");
/// Volumes.
pub const VOLUME: Noun = noun("vol", "volume", "InvalidVolumeID.Malformed", "InvalidVolume.NotFound", "The volume '{}' does not exist.");
/// Images.
pub const IMAGE: Noun = noun("ami", "image", "InvalidAMIID.Malformed", "InvalidAMIID.NotFound", "The image id '[{}]' does not exist");

/// Managed prefix lists.
pub const PREFIX_LIST: Noun =
    noun("pl", "prefix-list", "InvalidPrefixListId.Malformed", "InvalidPrefixListID.NotFound", "The prefix list ID '{}' does not exist");

/// Every kind that carries tags.
pub const TAGGABLE: &[&Noun] = &[
    &VPC,
    &SUBNET,
    &DHCP_OPTIONS,
    &INTERNET_GATEWAY,
    &ROUTE_TABLE,
    &NETWORK_ACL,
    &SECURITY_GROUP,
    &SECURITY_GROUP_RULE,
    &NETWORK_INTERFACE,
    &ADDRESS,
    &KEY_PAIR,
    &INSTANCE,
    &VOLUME,
    &IMAGE,
    &PREFIX_LIST,
    &NAT_GATEWAY,
    &VPC_PEERING_CONNECTION,
];

impl Noun {
    /// Whether `id` looks like an id of this kind.
    pub fn fits(&self, id: &str) -> bool {
        id.strip_prefix(self.prefix)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|digits| matches!(digits.len(), 8 | 17) && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
    }

    /// Refuses an id that cannot be one of this kind.
    ///
    /// # Errors
    /// EC2's `Malformed` code of the noun, or its `NotFound` code where EC2 has no other.
    pub fn check(&self, id: &str) -> Result<(), ApiError> {
        if self.fits(id) {
            return Ok(());
        }
        if self.malformed == self.not_found {
            return Err(self.not_found(id));
        }
        Err(ApiError::new(self.malformed, format!("Invalid id: \"{id}\" (expecting \"{}-...\")", self.prefix)))
    }

    /// Checks every id of a request.
    ///
    /// # Errors
    /// As [`Noun::check`], for the first that fails.
    pub fn check_all(&self, ids: &[String]) -> Result<(), ApiError> {
        ids.iter().try_for_each(|id| self.check(id))
    }

    /// The id that a request must hold under the name `parameter`.
    ///
    /// # Errors
    /// `MissingParameter` when it is absent, else as [`Noun::check`].
    pub fn required(&self, id: Option<String>, parameter: &str) -> Result<String, ApiError> {
        let id = id.filter(|id| !id.is_empty()).ok_or_else(|| ApiError::missing_parameter(parameter))?;
        self.check(&id)?;
        Ok(id)
    }

    /// A row of the asking account.
    ///
    /// # Errors
    /// The `Malformed` or `NotFound` answer of the noun; a row of another account is not found.
    pub fn row<R: Row>(&self, call: &Call<'_>, id: &str) -> Result<Arc<R>, ApiError> {
        self.check(id)?;
        call.get::<R>(id).ok_or_else(|| self.not_found(id))
    }

    /// The rows of the asking account that a Describe names by `ids`, or all of them, in the order of their ids.
    ///
    /// # Errors
    /// The `Malformed` or `NotFound` answer about the first bad id.
    pub fn rows<R: Row>(&self, call: &Call<'_>, ids: &[String]) -> Result<BTreeMap<String, Arc<R>>, ApiError> {
        if ids.is_empty() {
            return Ok(call.list::<R>().map(|row| (row.id().into_owned(), row.clone())).collect());
        }
        self.check_all(ids)?;
        ids.iter().map(|id| Ok((id.clone(), self.row(call, id)?))).collect()
    }

    /// The ARN of a resource of this kind.
    pub fn arn(&self, region: &Region, account: &str, id: &str) -> String {
        format!("arn:aws:ec2:{}:{account}:{}/{id}", region.name, self.resource_type)
    }

    /// The answer about an id that the account does not own.
    pub fn not_found(&self, id: &str) -> ApiError {
        ApiError::new(self.not_found, self.sentence.replace("{}", id))
    }
}

/// Refuses what EC2 has and this region has not: the parameters that were given.
///
/// # Errors
/// `UnsupportedOperation` that names the first parameter whose flag is set.
pub fn unsupported(parameters: &[(&str, bool)]) -> Result<(), ApiError> {
    match parameters.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(ApiError::new("UnsupportedOperation", format!("The parameter {name} is not supported in this region"))),
        None => Ok(()),
    }
}

/// The kind whose ids look like `id`.
pub fn kind_of(id: &str) -> Option<&'static Noun> {
    TAGGABLE.iter().find(|noun| noun.fits(id)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_ids_fit() {
        assert!(VPC.fits("vpc-0123456789abcdef0"));
        assert!(SECURITY_GROUP.fits("sg-12345678"));
    }

    #[test]
    fn malformed_ids_carry_the_code_of_their_noun() {
        for (noun, id, code) in [
            (&VPC, "vpc-xyz", "InvalidVpcID.Malformed"),
            (&VPC, "subnet-0123456789abcdef0", "InvalidVpcID.Malformed"),
            (&SUBNET, "subnet-0123456789ABCDEF0", "InvalidSubnetID.Malformed"),
            (&SECURITY_GROUP, "default", "InvalidGroupId.Malformed"),
            (&ROUTE_TABLE, "rtb-1", "InvalidRouteTableId.Malformed"),
            (&ADDRESS, "1.2.3.4", "InvalidAllocationID.NotFound"),
            (&INSTANCE, "i-", "InvalidInstanceID.Malformed"),
            (&VOLUME, "", "InvalidVolumeID.Malformed"),
        ] {
            assert_eq!(noun.check(id).unwrap_err().code, code, "{id}");
        }
    }

    #[test]
    fn an_id_names_its_kind() {
        assert_eq!(kind_of("i-0123456789abcdef0"), Some(&INSTANCE));
        assert_eq!(kind_of("igw-0123456789abcdef0"), Some(&INTERNET_GATEWAY));
        assert_eq!(kind_of("sgr-0123456789abcdef0"), Some(&SECURITY_GROUP_RULE));
        assert_eq!(kind_of("x-0123456789abcdef0"), None);
    }
}
