//! The private addresses of an interface: one primary, for good, and secondary ones that come and go.
//!
//! How many an interface may have depends on the type of its instance. An Elastic IP leads to one private address and moves with
//! it to another interface.

use std::net::Ipv4Addr;
use std::sync::Arc;

use super::MOST_ADDRESSES;
use crate::error::ApiError;
use crate::model::{Address, Instance, NetworkInterface, Subnet};
use crate::resource::id::{NETWORK_INTERFACE, SUBNET, unsupported};
use crate::resource::instance_type::{self, InstanceType};
use crate::resource::subnet;
use crate::shapes::{
    AssignPrivateIpAddressesRequest, AssignPrivateIpAddressesResult, AssignedPrivateIpAddress, PrivateIpAddressSpecification,
    UnassignPrivateIpAddressesRequest,
};
use crate::world::{Call, Tx};

/// The addresses that a new interface shall have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// None: any that is free.
    pub primary: Option<Ipv4Addr>,
    /// The secondary ones that are named.
    pub secondary: Vec<Ipv4Addr>,
    /// How many secondary ones besides, any that are free.
    pub more: usize,
}

impl Wanted {
    /// Reads `PrivateIpAddress`, `PrivateIpAddresses` and `SecondaryPrivateIpAddressCount`.
    ///
    /// # Errors
    /// `InvalidParameterCombination` for a count beside a list and for a primary address in both, `InvalidParameterValue` for what is no
    /// address, for two primary ones, and for a count below 0.
    pub fn new(primary: Option<&str>, list: Vec<PrivateIpAddressSpecification>, count: Option<i32>) -> Result<Self, ApiError> {
        if count.is_some() && !list.is_empty() {
            let message = "The parameters secondaryPrivateIpAddressCount and privateIpAddresses cannot be used together";
            return Err(ApiError::invalid_combination(message));
        }
        let mut wanted = Self { primary: primary.map(parse).transpose()?, secondary: Vec::new(), more: read_count(count)? };
        let mut primaries = 0;
        for specification in list {
            let text = specification.private_ip_address.ok_or_else(|| ApiError::missing_parameter("PrivateIpAddress"))?;
            let ip = parse(&text)?;
            if specification.primary != Some(true) {
                wanted.secondary.push(ip);
                continue;
            }
            primaries += 1;
            if 1 < primaries {
                return Err(ApiError::invalid_value("Only one primary private IP address can be specified"));
            }
            if primary.is_some() {
                let message = "The parameter privateIpAddress and a primary address in privateIpAddresses cannot be used together";
                return Err(ApiError::invalid_combination(message));
            }
            wanted.primary = Some(ip);
        }
        Ok(wanted)
    }

    /// How many addresses it is.
    pub fn count(&self) -> usize {
        self.secondary.len().saturating_add(self.more).saturating_add(1)
    }

    /// Whether any address is named: then only one interface can have them.
    pub fn names_any(&self) -> bool {
        self.primary.is_some() || !self.secondary.is_empty()
    }

    /// Takes them from a subnet; the primary one stands first.
    ///
    /// # Errors
    /// Those of [`subnet::free_addresses`].
    pub fn take(&self, tx: &mut Tx<'_>, subnet: &Subnet) -> Result<Vec<Ipv4Addr>, ApiError> {
        let named = self.secondary.iter().copied().map(Some);
        let all: Vec<_> = std::iter::once(self.primary).chain(named).chain(std::iter::repeat_n(None, self.more)).collect();
        subnet::free_addresses(tx, subnet, &all)
    }
}

fn parse(text: &str) -> Result<Ipv4Addr, ApiError> {
    text.parse().map_err(|_| ApiError::invalid_value(format!("Invalid IPv4 address '{text}'")))
}

fn read_count(count: Option<i32>) -> Result<usize, ApiError> {
    let count = count.unwrap_or(0);
    usize::try_from(count)
        .ok()
        .filter(|count| *count <= MOST_ADDRESSES)
        .ok_or_else(|| ApiError::invalid_value(format!("Value ({count}) for parameter secondaryPrivateIpAddressCount is invalid.")))
}

/// Whether an interface of an instance of this type may have `count` private addresses; without a type, whether any may.
///
/// # Errors
/// `PrivateIpAddressLimitExceeded`.
pub fn check_count(kind: Option<&InstanceType>, count: usize) -> Result<(), ApiError> {
    let most = kind.map_or(MOST_ADDRESSES, |kind| usize::try_from(kind.ipv4_per_interface).unwrap_or(usize::MAX));
    if count <= most {
        return Ok(());
    }
    Err(ApiError::new("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit."))
}

/// The type of the instance that an interface belongs to.
fn kind_of(call: &Call<'_>, interface: &NetworkInterface) -> Option<&'static InstanceType> {
    let instance = call.get::<Instance>(&interface.attachment.as_ref()?.instance_id)?;
    instance_type::find(&instance.instance_type)
}

/// AssignPrivateIpAddresses. An address that another interface of the subnet has as a secondary one moves, if the request allows it.
///
/// # Errors
/// `PrivateIpAddressLimitExceeded`, `InvalidParameterValue` for an address that is taken or outside the subnet,
/// `InsufficientFreeAddressesInSubnet`, `MissingParameter`, `InvalidParameterCombination`.
pub fn assign_private_ip_addresses(
    call: &mut Call<'_>,
    request: AssignPrivateIpAddressesRequest,
) -> Result<AssignPrivateIpAddressesResult, ApiError> {
    unsupported(&[("Ipv4PrefixCount", request.ipv4_prefix_count.is_some()), ("Ipv4Prefix", !request.ipv4_prefixes.is_empty())])?;
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = super::own(call, &id)?;
    let mut wanted = Vec::new();
    match (request.private_ip_addresses.as_slice(), request.secondary_private_ip_address_count) {
        ([], None) => {
            let message = "Either secondaryPrivateIpAddressCount or privateIpAddress must be specified";
            return Err(ApiError::new("MissingParameter", message));
        }
        ([], Some(0)) => return Err(ApiError::invalid_value("secondaryPrivateIpAddressCount must be at least 1")),
        ([], count) => wanted.resize(read_count(count)?, None),
        (list, None) => {
            for text in list {
                wanted.push(Some(parse(text)?));
            }
        }
        (_, Some(_)) => {
            let message = "The parameters secondaryPrivateIpAddressCount and privateIpAddress cannot be used together";
            return Err(ApiError::invalid_combination(message));
        }
    }
    // Before the comparison of each with each.
    check_count(None, wanted.len())?;
    let held: Vec<Ipv4Addr> = wanted.iter().flatten().copied().filter(|ip| interface.private_ips().any(|own| own == *ip)).collect();
    if let Some(first) = held.first() {
        if request.allow_reassignment != Some(true) || *first == interface.private_ip {
            return Err(taken(&held));
        }
        wanted.retain(|ip| ip.is_none_or(|ip| !held.contains(&ip)));
    }
    check_count(kind_of(call, &interface), interface.private_ips().count().saturating_add(wanted.len()))?;
    let subnet = SUBNET.row::<Subnet>(call, &interface.subnet_id)?;
    let moved = take_from_others(call, &interface, &wanted, request.allow_reassignment == Some(true))?;
    let added = subnet::free_addresses(&mut call.tx, &subnet, &wanted)?;
    call.tx.update::<NetworkInterface>(&interface.account_id, &id, |row| row.secondary_ips.extend(&added));
    for address in moved {
        call.tx.update::<Address>(&address.account_id, &address.id, |row| {
            if let Some(association) = &mut row.association {
                association.network_interface_id.clone_from(&id);
            }
        });
    }
    let assigned = added.iter().map(|ip| AssignedPrivateIpAddress { private_ip_address: Some(ip.to_string()) });
    Ok(AssignPrivateIpAddressesResult {
        network_interface_id: Some(id),
        assigned_private_ip_addresses: assigned.collect(),
        ..Default::default()
    })
}

fn taken(ips: &[Ipv4Addr]) -> ApiError {
    let ips: Vec<String> = ips.iter().map(Ipv4Addr::to_string).collect();
    ApiError::invalid_value(format!("Some of [{}] are assigned, but move is not allowed.", ips.join(", ")))
}

/// Takes the named addresses off the other interfaces of the subnet. Answers with the Elastic IPs that lead to them.
fn take_from_others(
    call: &mut Call<'_>,
    interface: &NetworkInterface,
    wanted: &[Option<Ipv4Addr>],
    allowed: bool,
) -> Result<Vec<Arc<Address>>, ApiError> {
    let mut moved = Vec::new();
    for ip in wanted.iter().flatten().copied() {
        let others = call.find::<NetworkInterface>("subnet", &interface.subnet_id);
        let Some(other) = others.into_iter().find(|other| other.private_ips().any(|held| held == ip)) else { continue };
        // A primary address stays for the life of its interface.
        if !allowed || other.private_ip == ip {
            return Err(taken(&[ip]));
        }
        let leads = |address: &Arc<Address>| address.association.as_ref().is_some_and(|association| association.private_ip == ip);
        moved.extend(call.find::<Address>("interface", &other.id).into_iter().filter(leads));
        call.tx.update::<NetworkInterface>(&other.account_id, &other.id, |row| row.secondary_ips.retain(|held| *held != ip));
    }
    Ok(moved)
}

/// UnassignPrivateIpAddresses. An Elastic IP that leads to one of them is disassociated.
///
/// # Errors
/// `InvalidParameterValue` for the primary address and for one that the interface has not.
pub fn unassign_private_ip_addresses(call: &mut Call<'_>, request: UnassignPrivateIpAddressesRequest) -> Result<(), ApiError> {
    unsupported(&[("Ipv4Prefix", !request.ipv4_prefixes.is_empty())])?;
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = super::own(call, &id)?;
    if request.private_ip_addresses.is_empty() {
        return Err(ApiError::missing_parameter("PrivateIpAddress"));
    }
    let ips = request.private_ip_addresses.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>()?;
    if ips.contains(&interface.private_ip) {
        let message = format!("{} is the primary private IP address of interface {id} and cannot be unassigned", interface.private_ip);
        return Err(ApiError::invalid_value(message));
    }
    let missing: Vec<String> = ips.iter().filter(|ip| !interface.secondary_ips.contains(ip)).map(Ipv4Addr::to_string).collect();
    if !missing.is_empty() {
        return Err(ApiError::invalid_value(format!("Some of [{}] are not assigned to interface {id}", missing.join(", "))));
    }
    for address in call.find::<Address>("interface", &id) {
        if address.association.as_ref().is_some_and(|association| ips.contains(&association.private_ip)) {
            call.tx.update::<Address>(&address.account_id, &address.id, |row| row.association = None);
        }
    }
    call.tx.update::<NetworkInterface>(&interface.account_id, &id, |row| row.secondary_ips.retain(|ip| !ips.contains(ip)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::address::{allocate_address, associate_address, public_ip_of};
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::AssociateAddressRequest;

    const INSTANCE: &str = "i-0123456789abcdef0";

    fn assign(id: &str, ips: &[&str]) -> AssignPrivateIpAddressesRequest {
        AssignPrivateIpAddressesRequest {
            network_interface_id: Some(id.into()),
            private_ip_addresses: ips.iter().map(|ip| (*ip).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn count(id: &str, count: i32) -> AssignPrivateIpAddressesRequest {
        AssignPrivateIpAddressesRequest { secondary_private_ip_address_count: Some(count), ..assign(id, &[]) }
    }

    fn unassign(id: &str, ips: &[&str]) -> UnassignPrivateIpAddressesRequest {
        UnassignPrivateIpAddressesRequest {
            network_interface_id: Some(id.into()),
            private_ip_addresses: ips.iter().map(|ip| (*ip).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn secondary(fixture: &Fixture, id: &str) -> Vec<String> {
        let row = fixture.world.begin().get::<NetworkInterface>(ALICE, id).unwrap();
        row.secondary_ips.iter().map(Ipv4Addr::to_string).collect()
    }

    #[test]
    fn addresses_come_by_number_or_by_name_and_go_again() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let interface = fixture.interface(ALICE, &subnet.id, None).unwrap();
        let free = || subnet::available(&fixture.world.begin(), &subnet);
        let before = free();
        let added = fixture.call(ALICE, |call| assign_private_ip_addresses(call, count(&interface.id, 2))).unwrap();
        assert_eq!((added.assigned_private_ip_addresses.len(), free()), (2, before - 2));
        fixture.call(ALICE, |call| assign_private_ip_addresses(call, assign(&interface.id, &["172.31.1.77"]))).unwrap();
        assert_eq!(secondary(&fixture, &interface.id)[2], "172.31.1.77");
        fixture.call(ALICE, |call| unassign_private_ip_addresses(call, unassign(&interface.id, &["172.31.1.77"]))).unwrap();
        assert_eq!((secondary(&fixture, &interface.id).len(), free()), (2, before - 2));
        let primary = interface.private_ip.to_string();
        for ip in [primary.as_str(), "172.31.1.77", "nonsense"] {
            let refused = fixture.refusal(ALICE, |call| unassign_private_ip_addresses(call, unassign(&interface.id, &[ip])));
            assert_eq!(refused, "InvalidParameterValue", "{ip}");
        }
        for ip in [primary.as_str(), "172.31.0.1", "10.0.0.1", "nonsense"] {
            let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, assign(&interface.id, &[ip])));
            assert_eq!(refused, "InvalidParameterValue", "{ip}");
        }
        let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, assign(&interface.id, &[])));
        assert_eq!(refused, "MissingParameter");
        let refused = fixture.refusal(BOB, |call| assign_private_ip_addresses(call, count(&interface.id, 1)));
        assert_eq!(refused, "InvalidNetworkInterfaceID.NotFound");
    }

    #[test]
    fn the_type_of_the_instance_limits_the_addresses() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, INSTANCE);
        // A t3.micro has two for each interface.
        fixture.call(ALICE, |call| assign_private_ip_addresses(call, count(&interface.id, 1))).unwrap();
        let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, count(&interface.id, 1)));
        assert_eq!(refused, "PrivateIpAddressLimitExceeded");
        let loose = fixture.interface(ALICE, &interface.subnet_id, None).unwrap();
        fixture.call(ALICE, |call| assign_private_ip_addresses(call, count(&loose.id, 49))).unwrap();
        let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, count(&loose.id, 1)));
        assert_eq!(refused, "PrivateIpAddressLimitExceeded");
    }

    #[test]
    fn a_secondary_address_moves_with_its_elastic_ip_if_allowed() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let (one, two) = (fixture.interface(ALICE, &subnet.id, None).unwrap(), fixture.interface(ALICE, &subnet.id, None).unwrap());
        fixture.call(ALICE, |call| assign_private_ip_addresses(call, assign(&one.id, &["172.31.1.77"]))).unwrap();
        let allocation = fixture.call(ALICE, |call| allocate_address(call, Default::default())).unwrap();
        let associate = AssociateAddressRequest {
            allocation_id: allocation.allocation_id,
            network_interface_id: Some(one.id.clone()),
            private_ip_address: Some("172.31.1.77".into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| associate_address(call, associate)).unwrap();
        let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, assign(&two.id, &["172.31.1.77"])));
        assert_eq!(refused, "InvalidParameterValue");
        let moving = |ip: &str| AssignPrivateIpAddressesRequest { allow_reassignment: Some(true), ..assign(&two.id, &[ip]) };
        let refused = fixture.refusal(ALICE, |call| assign_private_ip_addresses(call, moving(&one.private_ip.to_string())));
        assert_eq!(refused, "InvalidParameterValue", "a primary address stays");
        fixture.call(ALICE, |call| assign_private_ip_addresses(call, moving("172.31.1.77"))).unwrap();
        assert!(secondary(&fixture, &one.id).is_empty());
        assert_eq!(secondary(&fixture, &two.id), ["172.31.1.77"]);
        let public = |id: &str| {
            let tx = fixture.world.begin();
            let interface = tx.get::<NetworkInterface>(ALICE, id).unwrap();
            public_ip_of(&tx, &interface, Ipv4Addr::new(172, 31, 1, 77)).map(|ip| ip.to_string())
        };
        assert_eq!(public(&two.id), allocation.public_ip);
        fixture.call(ALICE, |call| unassign_private_ip_addresses(call, unassign(&two.id, &["172.31.1.77"]))).unwrap();
        let tx = fixture.world.begin();
        assert!(tx.list::<Address>(ALICE).all(|address| address.association.is_none()));
    }

    #[test]
    fn a_new_interface_names_its_addresses_in_one_way() {
        let one = |ip: &str, primary: bool| PrivateIpAddressSpecification { private_ip_address: Some(ip.into()), primary: Some(primary) };
        let list = || vec![one("10.0.0.5", true), one("10.0.0.6", false)];
        let wanted = Wanted::new(None, list(), None).unwrap();
        assert_eq!((wanted.primary, wanted.count()), (Some(Ipv4Addr::new(10, 0, 0, 5)), 2));
        assert_eq!(Wanted::new(Some("10.0.0.9"), vec![], Some(3)).unwrap().count(), 4);
        for (primary, list, count, code) in [
            (Some("10.0.0.9"), list(), None, "InvalidParameterCombination"),
            (None, list(), Some(1), "InvalidParameterCombination"),
            (None, vec![one("10.0.0.5", true), one("10.0.0.6", true)], None, "InvalidParameterValue"),
            (Some("x"), vec![], None, "InvalidParameterValue"),
            (None, vec![], Some(-1), "InvalidParameterValue"),
        ] {
            assert_eq!(Wanted::new(primary, list, count).unwrap_err().code, code);
        }
    }
}
