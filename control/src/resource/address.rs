//! Public addresses: Elastic IPs, and the ones that instances get at their start.
//!
//! Both come from the region's pool. A row of [`PublicIp`] says who holds an address, so none is held twice. An interface that gets an
//! Elastic IP gives its own public address back, and takes a new one when the Elastic IP leaves it while its instance runs.

use std::net::Ipv4Addr;
use std::sync::Arc;

use super::filter::Filters;
use super::id::{ADDRESS, ADDRESS_ASSOCIATION, INSTANCE, NETWORK_INTERFACE, unsupported};
use super::{nat_gateway, tag};
use crate::error::ApiError;
use crate::model::{Address, AddressAssociation, Instance, InstanceState, InternetGateway, NetworkInterface, PublicIp, REGION, Vpc};
use crate::shapes::{
    self, AllocateAddressRequest, AllocateAddressResult, AssociateAddressRequest, AssociateAddressResult, DescribeAddressesRequest,
    DescribeAddressesResult, DisassociateAddressRequest, ReleaseAddressRequest,
};
use crate::world::{Call, Region, Tx};

/// The most Elastic IPs of an account.
pub const MOST_ADDRESSES: usize = 5;
/// The name of the only pool.
const POOL: &str = "amazon";

/// AllocateAddress.
///
/// # Errors
/// `AddressLimitExceeded`, `InsufficientAddressCapacity` when the pool is dry, those of tags.
pub fn allocate_address(call: &mut Call<'_>, request: AllocateAddressRequest) -> Result<AllocateAddressResult, ApiError> {
    unsupported(&[
        ("CustomerOwnedIpv4Pool", request.customer_owned_ipv4_pool.is_some()),
        ("IpamPoolId", request.ipam_pool_id.is_some()),
        ("PublicIpv4Pool", request.public_ipv4_pool.as_deref().is_some_and(|pool| pool != POOL)),
        ("Domain", request.domain.as_deref() == Some("standard")),
    ])?;
    check_border_group(call.region, request.network_border_group.as_deref())?;
    let tags = tag::specified(request.tag_specifications, &ADDRESS)?;
    if call.list::<Address>().count() >= MOST_ADDRESSES {
        let message = "The maximum number of addresses has been reached.";
        return Err(ApiError::new("AddressLimitExceeded", message));
    }
    let wanted = request.address.as_deref().map(parse_ip).transpose()?;
    let account = call.account().to_owned();
    let id = call.tx.new_id(ADDRESS.prefix);
    let public_ip = take(&mut call.tx, call.region, &account, &id, wanted)?;
    let created = call.now;
    call.tx.put(Address { account_id: account.clone(), id: id.clone(), public_ip, association: None, created });
    tag::set(&mut call.tx, &account, &ADDRESS, &id, tags);
    Ok(AllocateAddressResult {
        allocation_id: Some(id),
        public_ip: Some(public_ip.to_string()),
        public_ipv4_pool: Some(POOL.into()),
        domain: Some("vpc".into()),
        network_border_group: Some(call.region.name.clone()),
        ..Default::default()
    })
}

fn check_border_group(region: &Region, group: Option<&str>) -> Result<(), ApiError> {
    match group.filter(|group| *group != region.name) {
        Some(other) => Err(ApiError::invalid_parameter("networkBorderGroup", other)),
        None => Ok(()),
    }
}

fn parse_ip(text: &str) -> Result<Ipv4Addr, ApiError> {
    text.parse().map_err(|_| ApiError::invalid_value(format!("Invalid IPv4 address: {text}")))
}

/// The Elastic IP that a request names by id or by address.
fn named(call: &Call<'_>, allocation_id: Option<String>, public_ip: Option<String>) -> Result<Arc<Address>, ApiError> {
    match (allocation_id, public_ip) {
        (Some(_), Some(_)) => {
            Err(ApiError::invalid_combination("You may specify public IP or allocation id, but not both in the same call"))
        }
        (Some(id), None) => ADDRESS.row(call, &id),
        (None, Some(ip)) => call.find::<Address>("ip", &ip).into_iter().next().ok_or_else(|| ip_not_found(&ip)),
        (None, None) => Err(ApiError::new("MissingParameter", "Either public IP or allocation id must be specified")),
    }
}

fn ip_not_found(ip: &str) -> ApiError {
    ApiError::new("InvalidAddress.NotFound", format!("Address '{ip}' not found."))
}

/// AssociateAddress. Repeating it changes nothing; an address moves from another interface unless the request forbids it.
///
/// # Errors
/// `Resource.AlreadyAssociated` when it may not move, `Gateway.NotAttached` for a VPC without internet gateway, `NotFound` codes.
pub fn associate_address(call: &mut Call<'_>, request: AssociateAddressRequest) -> Result<AssociateAddressResult, ApiError> {
    let address = named(call, request.allocation_id, request.public_ip)?;
    let interface = target(call, request.instance_id, request.network_interface_id)?;
    let private_ip = request.private_ip_address.as_deref().map(parse_ip).transpose()?.unwrap_or(interface.private_ip);
    if !interface.private_ips().any(|ip| ip == private_ip) {
        let message = format!("The private IP address {private_ip} is not assigned to the network interface '{}'", interface.id);
        return Err(ApiError::invalid_value(message));
    }
    nat_gateway::check_not_managed(&call.tx, &interface.account_id, &interface.id)?;
    if call.find::<InternetGateway>("vpc", &interface.vpc_id).is_empty() {
        let message = format!("Network {} is not attached to any internet gateway", interface.vpc_id);
        return Err(ApiError::new("Gateway.NotAttached", message));
    }
    if let Some(association) = &address.association {
        if association.network_interface_id == interface.id && association.private_ip == private_ip {
            return Ok(AssociateAddressResult { association_id: Some(association.id.clone()) });
        }
        if request.allow_reassociation == Some(false) {
            let message = format!("resource {} is already associated with associate-id {}", address.id, association.id);
            return Err(ApiError::new("Resource.AlreadyAssociated", message));
        }
        nat_gateway::check_not_managed(&call.tx, &address.account_id, &association.network_interface_id)?;
        disassociate(call, &address);
    }
    // Another Elastic IP of the private address gives way.
    if let Some(other) = of_private_ip(&call.tx, &interface, private_ip) {
        if request.allow_reassociation == Some(false) {
            let message = format!("resource {} is already associated with {}", interface.id, other.id);
            return Err(ApiError::new("Resource.AlreadyAssociated", message));
        }
        call.tx.update::<Address>(&other.account_id, &other.id, |other| other.association = None);
    }
    if private_ip == interface.private_ip {
        auto_free(&mut call.tx, &interface.account_id, &interface.id);
    }
    let id = associate_with(&mut call.tx, &address, &interface.id, private_ip);
    Ok(AssociateAddressResult { association_id: Some(id) })
}

/// Leads an Elastic IP that is free to a private address of an interface; returns the id of the association.
pub fn associate_with(tx: &mut Tx<'_>, address: &Address, interface_id: &str, private_ip: Ipv4Addr) -> String {
    let id = tx.new_id(ADDRESS_ASSOCIATION.prefix);
    let association = AddressAssociation { id: id.clone(), network_interface_id: interface_id.to_owned(), private_ip };
    tx.update::<Address>(&address.account_id, &address.id, |address| address.association = Some(association));
    id
}

/// The interface that a request names, or the only interface of the instance that it names.
fn target(call: &Call<'_>, instance_id: Option<String>, interface_id: Option<String>) -> Result<Arc<NetworkInterface>, ApiError> {
    let instance_id = match (instance_id, interface_id) {
        (Some(_), Some(_)) => {
            let message = "You may specify instance id or network interface id, but not both in the same call";
            return Err(ApiError::invalid_combination(message));
        }
        (None, None) => {
            return Err(ApiError::new("MissingParameter", "Either instance id or network interface id must be specified"));
        }
        (None, Some(id)) => return NETWORK_INTERFACE.row(call, &id),
        (Some(id), None) => id,
    };
    let instance = INSTANCE.row::<Instance>(call, &instance_id)?;
    if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
        let message = format!("The instance '{instance_id}' is not in a valid state for this operation.");
        return Err(ApiError::new("IncorrectInstanceState", message));
    }
    let mut interfaces = call.find::<NetworkInterface>("instance", &instance_id).into_iter();
    match (interfaces.next(), interfaces.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(ApiError::new("InvalidInstanceID", format!("The instance '{instance_id}' has no network interface"))),
        (Some(_), Some(_)) => {
            let message = format!(
                "There are multiple interfaces attached to instance '{instance_id}'. Please specify an interface ID for the operation instead."
            );
            Err(ApiError::new("InvalidInstanceID", message))
        }
    }
}

/// DisassociateAddress. An address without an association is left as it is.
///
/// # Errors
/// `InvalidAssociationID.NotFound`, `InvalidAddress.NotFound`, `AuthFailure` for the address of a NAT gateway.
pub fn disassociate_address(call: &mut Call<'_>, request: DisassociateAddressRequest) -> Result<(), ApiError> {
    let address = match (request.association_id, request.public_ip) {
        (Some(_), Some(_)) => {
            let message = "You may specify public IP or association id, but not both in the same call";
            return Err(ApiError::invalid_combination(message));
        }
        (Some(id), None) => {
            let holds = |address: &&Arc<Address>| address.association.as_ref().is_some_and(|association| association.id == id);
            call.list::<Address>().find(holds).cloned().ok_or_else(|| ADDRESS_ASSOCIATION.not_found(&id))?
        }
        (None, ip @ Some(_)) => named(call, None, ip)?,
        (None, None) => return Err(ApiError::new("MissingParameter", "Either public IP or association id must be specified")),
    };
    if let Some(association) = &address.association {
        nat_gateway::check_not_managed(&call.tx, &address.account_id, &association.network_interface_id)?;
    }
    disassociate(call, &address);
    Ok(())
}

/// Takes an address off its interface, which gets a public address of its own again if its instance runs and was launched with one.
fn disassociate(call: &mut Call<'_>, address: &Address) {
    let Some(association) = &address.association else { return };
    call.tx.update::<Address>(&address.account_id, &address.id, |address| address.association = None);
    let Some(interface) = call.get::<NetworkInterface>(&association.network_interface_id) else { return };
    let instance = interface.attachment.as_ref().and_then(|attachment| call.get::<Instance>(&attachment.instance_id));
    let runs = instance.is_some_and(|instance| matches!(instance.state, InstanceState::Pending | InstanceState::Running));
    if runs && interface.associate_public_ip && association.private_ip == interface.private_ip {
        // A dry pool is no reason to keep the Elastic IP where it is not wanted.
        if let Err(error) = auto_take(&mut call.tx, call.region, &interface.account_id, &interface.id) {
            tracing::warn!(interface = %interface.id, %error, "no public address after an Elastic IP left");
        }
    }
}

/// ReleaseAddress.
///
/// # Errors
/// `InvalidIPAddress.InUse` while it is associated (in a default VPC the release ends the association), `NotFound` codes.
pub fn release_address(call: &mut Call<'_>, request: ReleaseAddressRequest) -> Result<(), ApiError> {
    check_border_group(call.region, request.network_border_group.as_deref())?;
    let address = named(call, request.allocation_id, request.public_ip)?;
    if let Some(association) = &address.association {
        nat_gateway::check_not_managed(&call.tx, &address.account_id, &association.network_interface_id)?;
        let interface = call.get::<NetworkInterface>(&association.network_interface_id);
        let vpc = interface.and_then(|interface| call.get::<Vpc>(&interface.vpc_id));
        if !vpc.is_some_and(|vpc| vpc.is_default) {
            let message = format!("Address {} is in use.", address.public_ip);
            return Err(ApiError::new("InvalidIPAddress.InUse", message));
        }
        disassociate(call, &address);
    }
    free(&mut call.tx, address.public_ip);
    tag::remove(&mut call.tx, &address.account_id, &address.id);
    call.tx.delete::<Address>(&address.account_id, &address.id);
    Ok(())
}

/// DescribeAddresses.
///
/// # Errors
/// `InvalidAllocationID.NotFound`, `InvalidAddress.NotFound` and those of filters.
pub fn describe_addresses(call: &mut Call<'_>, request: DescribeAddressesRequest) -> Result<DescribeAddressesResult, ApiError> {
    let names = [
        "allocation-id",
        "association-id",
        "domain",
        "instance-id",
        "network-border-group",
        "network-interface-id",
        "network-interface-owner-id",
        "private-ip-address",
        "public-ip",
        "tag",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let mut rows = Vec::new();
    for id in &request.allocation_ids {
        rows.push(ADDRESS.row::<Address>(call, id)?);
    }
    for ip in &request.public_ips {
        rows.push(call.find::<Address>("ip", ip).into_iter().next().ok_or_else(|| ip_not_found(ip))?);
    }
    if rows.is_empty() {
        rows = call.list::<Address>().cloned().collect();
    }
    rows.sort_by(|a, b| a.id.cmp(&b.id));
    rows.dedup_by(|a, b| a.id == b.id);
    let passes = |address: &&Arc<Address>| {
        let association = |test: &dyn Fn(&AddressAssociation) -> bool| address.association.as_ref().is_some_and(test);
        filters.pass(&tag::of(&call.tx, call.account(), &address.id), |name, test| match name {
            "allocation-id" => test(&address.id),
            "association-id" => association(&|association| test(&association.id)),
            "domain" => test("vpc"),
            "instance-id" => instance_of(call, address).is_some_and(|id| test(&id)),
            "network-border-group" => test(&call.region.name),
            "network-interface-id" => association(&|association| test(&association.network_interface_id)),
            "network-interface-owner-id" => association(&|_| test(&address.account_id)),
            "private-ip-address" => association(&|association| test(&association.private_ip.to_string())),
            "public-ip" => test(&address.public_ip.to_string()),
            _ => false,
        })
    };
    Ok(DescribeAddressesResult { addresses: rows.iter().filter(passes).map(|address| shape(call, address)).collect() })
}

fn instance_of(call: &Call<'_>, address: &Address) -> Option<String> {
    let interface = call.get::<NetworkInterface>(&address.association.as_ref()?.network_interface_id)?;
    interface.attachment.as_ref().map(|attachment| attachment.instance_id.clone())
}

fn shape(call: &Call<'_>, address: &Address) -> shapes::Address {
    let association = address.association.as_ref();
    shapes::Address {
        allocation_id: Some(address.id.clone()),
        public_ip: Some(address.public_ip.to_string()),
        public_ipv4_pool: Some(POOL.into()),
        domain: Some("vpc".into()),
        network_border_group: Some(call.region.name.clone()),
        association_id: association.map(|association| association.id.clone()),
        network_interface_id: association.map(|association| association.network_interface_id.clone()),
        network_interface_owner_id: association.map(|_| address.account_id.clone()),
        private_ip_address: association.map(|association| association.private_ip.to_string()),
        instance_id: instance_of(call, address),
        tags: tag::shapes(&tag::of(&call.tx, &address.account_id, &address.id)),
        ..Default::default()
    }
}

/// The Elastic IP that leads to a private address of an interface.
pub fn of_private_ip(tx: &Tx<'_>, interface: &NetworkInterface, private_ip: Ipv4Addr) -> Option<Arc<Address>> {
    let leads = |address: &Arc<Address>| address.association.as_ref().is_some_and(|association| association.private_ip == private_ip);
    tx.find::<Address>(&interface.account_id, "interface", &interface.id).into_iter().find(leads)
}

/// The public address of an interface: that of its primary private address.
pub fn public_ip(tx: &Tx<'_>, interface: &NetworkInterface) -> Option<Ipv4Addr> {
    public_ip_of(tx, interface, interface.private_ip)
}

/// The public address that leads to a private one: an Elastic IP, else, for the primary, the one that came with the start of the
/// instance.
pub fn public_ip_of(tx: &Tx<'_>, interface: &NetworkInterface, private_ip: Ipv4Addr) -> Option<Ipv4Addr> {
    let auto = interface.auto_public_ip.filter(|_| private_ip == interface.private_ip);
    of_private_ip(tx, interface, private_ip).map(|address| address.public_ip).or(auto)
}

/// Gives an interface a public address for as long as its instance runs; one that has a public address keeps it.
///
/// # Errors
/// `InsufficientAddressCapacity` when the pool is dry.
pub fn auto_take(tx: &mut Tx<'_>, region: &Region, account: &str, interface_id: &str) -> Result<(), ApiError> {
    let Some(interface) = tx.get::<NetworkInterface>(account, interface_id) else { return Ok(()) };
    if public_ip(tx, &interface).is_some() {
        return Ok(());
    }
    let ip = take(tx, region, account, interface_id, None)?;
    tx.update::<NetworkInterface>(account, interface_id, |interface| interface.auto_public_ip = Some(ip));
    Ok(())
}

/// Gives the public address of an interface back to the pool; an Elastic IP stays.
pub fn auto_free(tx: &mut Tx<'_>, account: &str, interface_id: &str) {
    let Some(interface) = tx.get::<NetworkInterface>(account, interface_id) else { return };
    if let Some(ip) = interface.auto_public_ip {
        free(tx, ip);
        tx.update::<NetworkInterface>(account, interface_id, |interface| interface.auto_public_ip = None);
    }
}

/// Ends whatever public address an interface has, before it goes: an Elastic IP stays the account's.
pub fn interface_release(tx: &mut Tx<'_>, account: &str, interface_id: &str) {
    auto_free(tx, account, interface_id);
    for address in tx.find::<Address>(account, "interface", interface_id) {
        tx.update::<Address>(account, &address.id, |address| address.association = None);
    }
}

/// Takes an address out of the pool. The search begins at a random place, so that an address that was just given back is not the next
/// tenant's at once.
fn take(tx: &mut Tx<'_>, region: &Region, account: &str, holder: &str, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr, ApiError> {
    let (first, last) = (u32::from(*region.public_pool.start()), u32::from(*region.public_pool.end()));
    let taken = |tx: &Tx<'_>, ip: Ipv4Addr| tx.get::<PublicIp>(REGION, &ip.to_string()).is_some();
    let ip = match wanted {
        Some(ip) if !region.public_pool.contains(&ip) => return Err(ip_not_found(&ip.to_string())),
        Some(ip) if taken(tx, ip) => {
            return Err(ApiError::new("InvalidAddress.Locked", format!("Address {ip} is not available for allocation.")));
        }
        Some(ip) => ip,
        None => {
            let size = last.checked_sub(first).map_or(0, |span| u64::from(span).saturating_add(1));
            let start = u64::from(u32::from_le_bytes(tx.random()));
            let places = (0..size).filter_map(|step| start.wrapping_add(step).checked_rem(size));
            let mut addresses = places.filter_map(|place| u32::try_from(place).ok()).map(|place| Ipv4Addr::from(first.wrapping_add(place)));
            let message = "There are not enough free public addresses in the region.";
            addresses.find(|ip| !taken(tx, *ip)).ok_or_else(|| ApiError::new("InsufficientAddressCapacity", message))?
        }
    };
    tx.put(PublicIp { ip, account_id: account.to_owned(), holder: holder.to_owned() });
    Ok(ip)
}

fn free(tx: &mut Tx<'_>, ip: Ipv4Addr) {
    tx.delete::<PublicIp>(REGION, &ip.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::network_interface;

    const ONE: &str = "i-0123456789abcdef1";
    const TWO: &str = "i-0123456789abcdef2";

    fn allocate(fixture: &Fixture, account: &str) -> String {
        fixture.call(account, |call| allocate_address(call, Default::default())).unwrap().allocation_id.unwrap()
    }

    fn associate(id: &str, instance: &str) -> AssociateAddressRequest {
        AssociateAddressRequest { allocation_id: Some(id.into()), instance_id: Some(instance.into()), ..Default::default() }
    }

    fn release(id: &str) -> ReleaseAddressRequest {
        ReleaseAddressRequest { allocation_id: Some(id.into()), ..Default::default() }
    }

    fn public(fixture: &Fixture, interface: &NetworkInterface) -> Option<Ipv4Addr> {
        let tx = fixture.world.begin();
        public_ip(&tx, &tx.get::<NetworkInterface>(&interface.account_id, &interface.id).unwrap())
    }

    fn address(fixture: &Fixture, id: &str) -> Address {
        Address::clone(&fixture.world.begin().get::<Address>(ALICE, id).unwrap())
    }

    #[test]
    fn an_account_has_at_most_five_addresses_and_none_is_given_twice() {
        let fixture = Fixture::new();
        let ids: Vec<String> = (0..5).map(|_| allocate(&fixture, ALICE)).collect();
        let ips: std::collections::BTreeSet<_> = ids.iter().map(|id| address(&fixture, id).public_ip).collect();
        assert_eq!(ips.len(), 5);
        assert!(ips.iter().all(|ip| fixture.world.region().public_pool.contains(ip)));
        assert_eq!(fixture.refusal(ALICE, |call| allocate_address(call, Default::default())), "AddressLimitExceeded");
        fixture.call(ALICE, |call| release_address(call, release(&ids[0]))).unwrap();
        allocate(&fixture, ALICE);
    }

    #[test]
    fn a_dry_pool_is_told_and_a_returned_address_serves_again() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let pool = fixture.world.region().public_pool.clone();
        let size = u32::from(*pool.end()) - u32::from(*pool.start()) + 1;
        let mut interfaces = Vec::new();
        for _ in 0..size {
            let interface = fixture.interface(ALICE, &subnet.id, None).unwrap();
            fixture.call(ALICE, |call| auto_take(&mut call.tx, call.region, ALICE, &interface.id)).unwrap();
            interfaces.push(interface);
        }
        assert_eq!(fixture.refusal(BOB, |call| allocate_address(call, Default::default())), "InsufficientAddressCapacity");
        fixture
            .call(ALICE, |call| {
                network_interface::remove(&mut call.tx, ALICE, &interfaces[0].id);
                Ok(())
            })
            .unwrap();
        allocate(&fixture, BOB);
    }

    #[test]
    fn an_address_moves_and_the_old_instance_gets_one_of_its_own_back() {
        let fixture = Fixture::new();
        let (one, two) = (fixture.instance(ALICE, ONE), fixture.instance(ALICE, TWO));
        for interface in [&one, &two] {
            fixture.call(ALICE, |call| auto_take(&mut call.tx, call.region, ALICE, &interface.id)).unwrap();
        }
        let before = fixture.world.begin().all::<PublicIp>().count();
        let id = allocate(&fixture, ALICE);
        let ip = address(&fixture, &id).public_ip;
        let first = fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap();
        assert_eq!(public(&fixture, &one), Some(ip));
        assert_eq!(fixture.world.begin().all::<PublicIp>().count(), before, "the launch's address went back to the pool");
        let again = fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap();
        assert_eq!(again, first, "repeating changes nothing");
        let held = AssociateAddressRequest { allow_reassociation: Some(false), ..associate(&id, TWO) };
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, held)), "Resource.AlreadyAssociated");
        fixture.call(ALICE, |call| associate_address(call, associate(&id, TWO))).unwrap();
        assert_eq!(public(&fixture, &two), Some(ip));
        assert!(public(&fixture, &one).is_some_and(|own| own != ip));
    }

    #[test]
    fn a_second_address_of_an_interface_replaces_the_first() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, ONE);
        let (first, second) = (allocate(&fixture, ALICE), allocate(&fixture, ALICE));
        for id in [&first, &second] {
            fixture.call(ALICE, |call| associate_address(call, associate(id, ONE))).unwrap();
        }
        assert_eq!(public(&fixture, &interface), Some(address(&fixture, &second).public_ip));
        assert_eq!(address(&fixture, &first).association, None);
    }

    #[test]
    fn addresses_leave_by_association_or_by_ip() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, ONE);
        let id = allocate(&fixture, ALICE);
        let association = fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap().association_id;
        let by_id = |id: Option<String>| DisassociateAddressRequest { association_id: id, ..Default::default() };
        assert_eq!(fixture.refusal(BOB, |call| disassociate_address(call, by_id(association.clone()))), "InvalidAssociationID.NotFound");
        fixture.call(ALICE, |call| disassociate_address(call, by_id(association.clone()))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| disassociate_address(call, by_id(association))), "InvalidAssociationID.NotFound");
        assert_eq!(address(&fixture, &id).association, None);
        fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap();
        let ip = address(&fixture, &id).public_ip;
        let by_ip = || DisassociateAddressRequest { public_ip: Some(ip.to_string()), ..Default::default() };
        assert_eq!(fixture.refusal(BOB, |call| disassociate_address(call, by_ip())), "InvalidAddress.NotFound");
        fixture.call(ALICE, |call| disassociate_address(call, by_ip())).unwrap();
        assert_ne!(public(&fixture, &interface), Some(ip));
    }

    #[test]
    fn an_elastic_address_survives_the_interface() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, ONE);
        let id = allocate(&fixture, ALICE);
        fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap();
        fixture
            .call(ALICE, |call| {
                network_interface::remove(&mut call.tx, ALICE, &interface.id);
                Ok(())
            })
            .unwrap();
        assert_eq!(address(&fixture, &id).association, None);
        assert_eq!(fixture.world.begin().all::<PublicIp>().count(), 1);
        fixture.call(ALICE, |call| release_address(call, release(&id))).unwrap();
        assert_eq!(fixture.world.begin().all::<PublicIp>().count(), 0);
        assert_eq!(fixture.refusal(ALICE, |call| release_address(call, release(&id))), "InvalidAllocationID.NotFound");
    }

    #[test]
    fn an_instance_with_several_interfaces_is_no_name_for_one() {
        let fixture = Fixture::new();
        let first = fixture.instance(ALICE, ONE);
        fixture.interface(ALICE, &first.subnet_id, Some(ONE)).unwrap();
        let id = allocate(&fixture, ALICE);
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, associate(&id, ONE))), "InvalidInstanceID");
        let request = AssociateAddressRequest { network_interface_id: Some(first.id), instance_id: None, ..associate(&id, ONE) };
        fixture.call(ALICE, |call| associate_address(call, request)).unwrap();
    }

    #[test]
    fn a_vpc_without_a_gateway_takes_no_public_address() {
        let fixture = Fixture::new();
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap();
        let request = shapes::CreateSubnetRequest { vpc_id: vpc.vpc_id, cidr_block: Some("10.0.0.0/24".into()), ..Default::default() };
        let subnet = fixture.call(ALICE, |call| super::super::subnet::create_subnet(call, request)).unwrap().subnet.unwrap();
        let interface = fixture.interface(ALICE, &subnet.subnet_id.unwrap(), None).unwrap();
        let request = AssociateAddressRequest {
            allocation_id: Some(allocate(&fixture, ALICE)),
            network_interface_id: Some(interface.id),
            ..Default::default()
        };
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, request)), "Gateway.NotAttached");
    }

    #[test]
    fn outside_the_default_vpc_an_address_in_use_is_not_released() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, ONE);
        let id = allocate(&fixture, ALICE);
        fixture.call(ALICE, |call| associate_address(call, associate(&id, ONE))).unwrap();
        fixture
            .call(ALICE, |call| {
                call.tx.update::<Vpc>(ALICE, &interface.vpc_id, |vpc| vpc.is_default = false);
                Ok(())
            })
            .unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| release_address(call, release(&id))), "InvalidIPAddress.InUse");
        fixture
            .call(ALICE, |call| {
                call.tx.update::<Vpc>(ALICE, &interface.vpc_id, |vpc| vpc.is_default = true);
                release_address(call, release(&id))
            })
            .unwrap();
    }

    #[test]
    fn foreign_addresses_instances_and_interfaces_are_unknown() {
        let fixture = Fixture::new();
        let theirs = fixture.instance(BOB, TWO);
        fixture.instance(ALICE, ONE);
        let (own, foreign) = (allocate(&fixture, ALICE), allocate(&fixture, BOB));
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, associate(&foreign, ONE))), "InvalidAllocationID.NotFound");
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, associate(&own, TWO))), "InvalidInstanceID.NotFound");
        let request = AssociateAddressRequest { allocation_id: Some(own), network_interface_id: Some(theirs.id), ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, request)), "InvalidNetworkInterfaceID.NotFound");
        assert_eq!(fixture.refusal(ALICE, |call| release_address(call, release(&foreign))), "InvalidAllocationID.NotFound");
        let request = DescribeAddressesRequest { allocation_ids: vec![foreign], ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| describe_addresses(call, request)), "InvalidAllocationID.NotFound");
        let all = fixture.call(ALICE, |call| describe_addresses(call, Default::default())).unwrap().addresses;
        assert_eq!(all.len(), 1);
    }
}
