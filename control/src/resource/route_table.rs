//! Route tables.
//!
//! The local routes are not stored: they follow from the blocks of the VPC. A stored route with the block of one takes its place. A subnet without an association of its own uses the table
//! that holds the VPC's main association. A route whose gateway is gone, or no longer attached to the VPC, stays as a black hole.

mod prefix_list_route;

use std::sync::Arc;

use ipnet::Ipv4Net;
pub(crate) use prefix_list_route::expanded;
pub(super) use prefix_list_route::fits;

use super::client_token::{self, Checked};
use super::filter::{Filters, Page};
use super::id::{INSTANCE, NETWORK_INTERFACE, ROUTE_TABLE, ROUTE_TABLE_ASSOCIATION, SUBNET, VPC, unsupported};
use super::{nat_gateway, tag, vpc, vpc_peering_connection};
use crate::error::ApiError;
use crate::model::{
    Instance, InternetGateway, NatGateway, NetworkInterface, PeeringState, PrefixListRoute, Route, RouteTable, RouteTableAssociation,
    RouteTarget, Subnet, Vpc,
};
use crate::shapes::{
    self, AssociateRouteTableRequest, AssociateRouteTableResult, CreateRouteRequest, CreateRouteResult, CreateRouteTableRequest,
    CreateRouteTableResult, DeleteRouteRequest, DeleteRouteTableRequest, DescribeRouteTablesRequest, DescribeRouteTablesResult,
    DisassociateRouteTableRequest, ReplaceRouteRequest, ReplaceRouteTableAssociationRequest, ReplaceRouteTableAssociationResult,
    RouteTableAssociationState,
};
use crate::world::{Call, Tx};

/// What EC2 calls the target of a local route.
const LOCAL: &str = "local";
/// The most route tables of a VPC.
const MOST_TABLES: usize = 200;
/// The most routes of a table.
const MOST_ROUTES: usize = 500;

/// CreateRouteTable.
///
/// # Errors
/// `InvalidVpcID.NotFound`, `RouteTableLimitExceeded`, `IdempotentParameterMismatch`, those of tags.
pub fn create_route_table(call: &mut Call<'_>, mut request: CreateRouteTableRequest) -> Result<CreateRouteTableResult, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateRouteTable", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => {
            let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
            return Ok(CreateRouteTableResult { route_table: Some(shape(call, &table)), client_token: token });
        }
    };
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &vpc_id)?;
    let tags = tag::specified(request.tag_specifications, &ROUTE_TABLE)?;
    if call.find::<RouteTable>("vpc", &vpc_id).len() >= MOST_TABLES {
        let message = format!("The maximum number of route tables has been reached for vpc '{vpc_id}'.");
        return Err(ApiError::new("RouteTableLimitExceeded", message));
    }
    let table = insert(&mut call.tx, &vpc.account_id, &vpc_id, false);
    tag::set(&mut call.tx, &vpc.account_id, &ROUTE_TABLE, &table.id, tags);
    fresh.remember(call, &table.id);
    Ok(CreateRouteTableResult { route_table: Some(shape(call, &table)), client_token: token })
}

/// Makes a table without routes of its own, as the main one or not.
pub fn insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str, main: bool) -> RouteTable {
    let association = main.then(|| RouteTableAssociation { id: tx.new_id(ROUTE_TABLE_ASSOCIATION.prefix), subnet_id: None, main });
    let table = RouteTable {
        account_id: account.to_owned(),
        id: tx.new_id(ROUTE_TABLE.prefix),
        vpc_id: vpc_id.to_owned(),
        routes: Vec::new(),
        associations: association.into_iter().collect(),
        prefix_list_routes: Vec::new(),
    };
    tx.put(table.clone());
    table
}

/// Whether a table holds the main association of its VPC.
pub fn is_main(table: &RouteTable) -> bool {
    table.associations.iter().any(|association| association.main)
}

/// The main table of a VPC.
pub fn main(tx: &Tx<'_>, account: &str, vpc_id: &str) -> Option<Arc<RouteTable>> {
    tx.find::<RouteTable>(account, "vpc", vpc_id).into_iter().find(|table| is_main(table))
}

/// The table that routes what leaves a subnet.
pub fn of_subnet(tx: &Tx<'_>, subnet: &Subnet) -> Option<Arc<RouteTable>> {
    let own = tx.find::<RouteTable>(&subnet.account_id, "subnet", &subnet.id).into_iter().next();
    own.or_else(|| main(tx, &subnet.account_id, &subnet.vpc_id))
}

/// Whether a route of a table leads anywhere.
pub fn is_active(tx: &Tx<'_>, table: &RouteTable, route: &Route) -> bool {
    match &route.target {
        RouteTarget::InternetGateway(id) => {
            tx.get::<InternetGateway>(&table.account_id, id).is_some_and(|gateway| gateway.vpc_id.as_ref() == Some(&table.vpc_id))
        }
        RouteTarget::NetworkInterface(id) => {
            tx.get::<NetworkInterface>(&table.account_id, id).is_some_and(|interface| interface.attachment.is_some())
        }
        RouteTarget::NatGateway(id) => tx.get::<NatGateway>(&table.account_id, id).is_some_and(|row| nat_gateway::is_usable(&row)),
        RouteTarget::VpcPeeringConnection(id) => {
            vpc_peering_connection::active(tx, &table.vpc_id).iter().any(|connection| connection.id == *id)
        }
    }
}

/// DeleteRouteTable.
///
/// # Errors
/// `DependencyViolation` for the main table and for one that subnets use.
pub fn delete_route_table(call: &mut Call<'_>, request: DeleteRouteTableRequest) -> Result<(), ApiError> {
    let id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
    if !table.associations.is_empty() {
        return Err(ApiError::dependency(format!("The routeTable '{id}' has dependencies and cannot be deleted.")));
    }
    tag::remove(&mut call.tx, &table.account_id, &id);
    call.tx.delete::<RouteTable>(&table.account_id, &id);
    Ok(())
}

/// AssociateRouteTable.
///
/// # Errors
/// `InvalidParameterValue` for a subnet of another VPC, `Resource.AlreadyAssociated` for one that names a table already.
pub fn associate_route_table(call: &mut Call<'_>, request: AssociateRouteTableRequest) -> Result<AssociateRouteTableResult, ApiError> {
    unsupported(&[("GatewayId", request.gateway_id.is_some()), ("PublicIpv4Pool", request.public_ipv4_pool.is_some())])?;
    let id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let subnet_id = SUBNET.required(request.subnet_id, "SubnetId")?;
    let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
    let subnet = SUBNET.row::<Subnet>(call, &subnet_id)?;
    if subnet.vpc_id != table.vpc_id {
        let message = format!("Route table {id} and subnet {subnet_id} belong to different networks");
        return Err(ApiError::invalid_value(message));
    }
    if !call.find::<RouteTable>("subnet", &subnet_id).is_empty() {
        let message = format!("The specified association for route table {id} conflicts with an existing association");
        return Err(ApiError::new("Resource.AlreadyAssociated", message));
    }
    let association = RouteTableAssociation { id: call.tx.new_id(ROUTE_TABLE_ASSOCIATION.prefix), subnet_id: Some(subnet_id), main: false };
    let association_id = association.id.clone();
    call.tx.update::<RouteTable>(&table.account_id, &id, |table| table.associations.push(association));
    Ok(AssociateRouteTableResult { association_id: Some(association_id), association_state: Some(associated()) })
}

fn associated() -> RouteTableAssociationState {
    RouteTableAssociationState { state: Some("associated".into()), status_message: None }
}

/// The table that holds an association, and the association.
fn association_of(call: &Call<'_>, id: &str) -> Result<(Arc<RouteTable>, RouteTableAssociation), ApiError> {
    ROUTE_TABLE_ASSOCIATION.check(id)?;
    let held = |table: &Arc<RouteTable>| {
        let association = table.associations.iter().find(|association| association.id == id)?;
        Some((table.clone(), association.clone()))
    };
    call.list::<RouteTable>().find_map(held).ok_or_else(|| ROUTE_TABLE_ASSOCIATION.not_found(id))
}

/// DisassociateRouteTable.
///
/// # Errors
/// `InvalidAssociationID.NotFound`, `InvalidParameterValue` for the main association.
pub fn disassociate_route_table(call: &mut Call<'_>, request: DisassociateRouteTableRequest) -> Result<(), ApiError> {
    let id = request.association_id.ok_or_else(|| ApiError::missing_parameter("AssociationId"))?;
    let (table, association) = association_of(call, &id)?;
    if association.main {
        return Err(ApiError::invalid_value(format!("cannot disassociate the main route table association {id}")));
    }
    call.tx.update::<RouteTable>(&table.account_id, &table.id, |table| table.associations.retain(|other| other.id != id));
    Ok(())
}

/// ReplaceRouteTableAssociation: moves a subnet, or the main association, to another table of the VPC, under a new id.
///
/// # Errors
/// `InvalidAssociationID.NotFound`, `InvalidParameterValue` for a table of another VPC.
pub fn replace_route_table_association(
    call: &mut Call<'_>,
    request: ReplaceRouteTableAssociationRequest,
) -> Result<ReplaceRouteTableAssociationResult, ApiError> {
    let id = request.association_id.ok_or_else(|| ApiError::missing_parameter("AssociationId"))?;
    let table_id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let (old, association) = association_of(call, &id)?;
    let new = ROUTE_TABLE.row::<RouteTable>(call, &table_id)?;
    if new.vpc_id != old.vpc_id {
        let message = format!("Route table {table_id} and association {id} belong to different networks");
        return Err(ApiError::invalid_value(message));
    }
    let association = RouteTableAssociation { id: call.tx.new_id(ROUTE_TABLE_ASSOCIATION.prefix), ..association };
    let new_association_id = Some(association.id.clone());
    call.tx.update::<RouteTable>(&old.account_id, &old.id, |table| table.associations.retain(|other| other.id != id));
    call.tx.update::<RouteTable>(&new.account_id, &table_id, |table| table.associations.push(association));
    Ok(ReplaceRouteTableAssociationResult { new_association_id, association_state: Some(associated()) })
}

/// CreateRoute.
///
/// # Errors
/// `RouteAlreadyExists`, the `NotFound` code of the target, `InvalidParameterValue` for a target of another VPC or a route inside the VPC,
/// `UnsupportedOperation` for other kinds of targets, `RouteLimitExceeded`.
pub fn create_route(call: &mut Call<'_>, request: CreateRouteRequest) -> Result<CreateRouteResult, ApiError> {
    unsupported(&[
        ("CarrierGatewayId", request.carrier_gateway_id.is_some()),
        ("CoreNetworkArn", request.core_network_arn.is_some()),
        ("EgressOnlyInternetGatewayId", request.egress_only_internet_gateway_id.is_some()),
        ("LocalGatewayId", request.local_gateway_id.is_some()),
        ("OdbNetworkArn", request.odb_network_arn.is_some()),
        ("TransitGatewayId", request.transit_gateway_id.is_some()),
        ("VpcEndpointId", request.vpc_endpoint_id.is_some()),
    ])?;
    let id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
    let list = request.destination_prefix_list_id.as_deref();
    let list = only_list(list, request.destination_cidr_block.as_ref(), request.destination_ipv6_cidr_block.as_ref())?;
    let list = list.map(|list| prefix_list_route::destination(call, list)).transpose()?;
    let asked = Asked {
        gateway_id: request.gateway_id,
        nat_gateway_id: request.nat_gateway_id,
        network_interface_id: request.network_interface_id,
        instance_id: request.instance_id,
        vpc_peering_connection_id: request.vpc_peering_connection_id,
    };
    if asked.gateway_id.as_deref() == Some(LOCAL) {
        return Err(ApiError::invalid_value("The local route exists in every route table and cannot be created"));
    }
    let target = target(call, &table, asked)?;
    if let Some(list) = list {
        prefix_list_route::add(call, &table, &list, target)?;
        return Ok(CreateRouteResult { r#return: Some(true) });
    }
    let destination = destination(request.destination_cidr_block, request.destination_ipv6_cidr_block.is_some())?;
    let local = local_blocks(call, &table);
    if local.contains(&destination) || table.routes.iter().any(|route| route.destination == destination) {
        return Err(ApiError::new("RouteAlreadyExists", format!("The route identified by {destination} already exists.")));
    }
    check_inside(call, &table, &local, destination, &target)?;
    let mut changed = RouteTable::clone(&table);
    changed.routes.push(Route { destination, target });
    if !fits(&call.tx, &changed, None) {
        return Err(too_many(&id));
    }
    call.tx.put(changed);
    Ok(CreateRouteResult { r#return: Some(true) })
}

fn too_many(id: &str) -> ApiError {
    ApiError::new("RouteLimitExceeded", format!("The maximum number of routes has been reached for route table '{id}'."))
}

/// The prefix list that is the only destination of a request, if one is.
fn only_list<'a>(list: Option<&'a str>, ipv4: Option<&String>, ipv6: Option<&String>) -> Result<Option<&'a str>, ApiError> {
    match list {
        Some(_) if ipv4.is_some() || ipv6.is_some() => Err(ApiError::invalid_combination("A route has exactly one destination")),
        list => Ok(list),
    }
}

fn destination(cidr: Option<String>, other: bool) -> Result<Ipv4Net, ApiError> {
    match (cidr, other) {
        (Some(text), false) => vpc::parse_cidr("destinationCidrBlock", &text),
        (Some(_), true) => Err(ApiError::invalid_combination("A route has exactly one destination")),
        (None, true) => {
            Err(ApiError::new("UnsupportedOperation", "The parameter DestinationIpv6CidrBlock is not supported in this region"))
        }
        (None, false) => Err(ApiError::missing_parameter("destinationCidrBlock")),
    }
}

/// The targets that a request names.
struct Asked {
    gateway_id: Option<String>,
    nat_gateway_id: Option<String>,
    network_interface_id: Option<String>,
    instance_id: Option<String>,
    vpc_peering_connection_id: Option<String>,
}

enum Named {
    Gateway(String),
    NatGateway(String),
    NetworkInterface(String),
    Instance(String),
    VpcPeeringConnection(String),
}

impl Asked {
    /// The only target.
    fn one(self) -> Result<Named, ApiError> {
        let mut all = [
            self.gateway_id.map(Named::Gateway),
            self.nat_gateway_id.map(Named::NatGateway),
            self.network_interface_id.map(Named::NetworkInterface),
            self.instance_id.map(Named::Instance),
            self.vpc_peering_connection_id.map(Named::VpcPeeringConnection),
        ]
        .into_iter()
        .flatten();
        let message = "The request must contain exactly one target of the route";
        match (all.next(), all.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err(ApiError::new("MissingParameter", message)),
            (Some(_), Some(_)) => Err(ApiError::invalid_combination(message)),
        }
    }
}

/// The one target that a request names; it has to be in the VPC of the table, or lead out of it.
fn target(call: &Call<'_>, table: &RouteTable, asked: Asked) -> Result<RouteTarget, ApiError> {
    let belongs = |what: &str, id: &str, vpc_id: Option<&str>| match vpc_id {
        Some(vpc_id) if vpc_id == table.vpc_id => Ok(()),
        _ => Err(ApiError::invalid_value(format!("route table {} and {what} {id} belong to different networks", table.id))),
    };
    match asked.one()? {
        Named::Gateway(id) => {
            let not_found = || ApiError::new("InvalidGatewayID.NotFound", format!("The gateway ID '{id}' does not exist"));
            let gateway = call.get::<InternetGateway>(&id).ok_or_else(not_found)?;
            belongs("network gateway", &id, gateway.vpc_id.as_deref())?;
            Ok(RouteTarget::InternetGateway(id))
        }
        Named::NatGateway(id) => {
            let not_found = || ApiError::new("InvalidNatGatewayID.NotFound", format!("The natGateway ID '{id}' does not exist"));
            let gateway = call.get::<NatGateway>(&id).filter(|gateway| nat_gateway::is_usable(gateway)).ok_or_else(not_found)?;
            belongs("NAT gateway", &id, Some(&gateway.vpc_id))?;
            Ok(RouteTarget::NatGateway(id))
        }
        Named::NetworkInterface(id) => {
            let interface = NETWORK_INTERFACE.row::<NetworkInterface>(call, &id)?;
            belongs("interface", &id, Some(&interface.vpc_id))?;
            nat_gateway::check_not_managed(&call.tx, &interface.account_id, &id)?;
            Ok(RouteTarget::NetworkInterface(id))
        }
        Named::Instance(id) => {
            INSTANCE.row::<Instance>(call, &id)?;
            let interfaces = call.find::<NetworkInterface>("instance", &id);
            let [interface] = interfaces.as_slice() else {
                let message =
                    format!("There is not exactly one interface attached to instance '{id}'. Please specify an interface ID instead.");
                return Err(ApiError::new("InvalidInstanceID", message));
            };
            belongs("interface", &interface.id, Some(&interface.vpc_id))?;
            Ok(RouteTarget::NetworkInterface(interface.id.clone()))
        }
        Named::VpcPeeringConnection(id) => {
            let row = vpc_peering_connection::row(call, &id)?;
            let own = [&row.requester.vpc_id, &row.accepter.vpc_id].into_iter().find(|vpc_id| **vpc_id == table.vpc_id);
            belongs("vpc peering connection", &id, own.map(String::as_str))?;
            // Before it is accepted the route is a black hole.
            if !matches!(row.state, PeeringState::Active | PeeringState::PendingAcceptance) {
                let message = format!("vpc peering connection {id} is {} and cannot be routed to", row.state.name());
                return Err(ApiError::invalid_value(message));
            }
            Ok(RouteTarget::VpcPeeringConnection(id))
        }
    }
}

fn local_blocks(call: &Call<'_>, table: &RouteTable) -> Vec<Ipv4Net> {
    call.get::<Vpc>(&table.vpc_id).map(|vpc| vpc::cidrs(&vpc).map(|(_, cidr)| cidr).collect()).unwrap_or_default()
}

/// Traffic inside the VPC stays there, with one exception: what goes to a whole subnet may be led through an appliance of the VPC.
fn check_inside(
    call: &Call<'_>,
    table: &RouteTable,
    local: &[Ipv4Net],
    destination: Ipv4Net,
    target: &RouteTarget,
) -> Result<(), ApiError> {
    let Some(block) = local.iter().find(|block| block.contains(&destination)) else { return Ok(()) };
    let whole =
        || local.contains(&destination) || call.find::<Subnet>("vpc", &table.vpc_id).iter().any(|subnet| subnet.cidr == destination);
    if !is_appliance(target) {
        let message = format!("Cannot create a more specific route for {destination} than local route {block}.");
        return Err(ApiError::invalid_value(message));
    }
    if !whole() {
        let message = format!("The destination {destination} lies in this VPC and is not the CIDR block of one of its subnets.");
        return Err(ApiError::invalid_value(message));
    }
    Ok(())
}

/// Whether a target stands inside the VPC.
fn is_appliance(target: &RouteTarget) -> bool {
    matches!(target, RouteTarget::NetworkInterface(_) | RouteTarget::NatGateway(_))
}

/// ReplaceRoute. A local route can be given to an appliance of the VPC, and back by LocalTarget.
///
/// # Errors
/// `InvalidParameterValue` when there is no such route, else as [`create_route`].
pub fn replace_route(call: &mut Call<'_>, request: ReplaceRouteRequest) -> Result<(), ApiError> {
    unsupported(&[
        ("CarrierGatewayId", request.carrier_gateway_id.is_some()),
        ("CoreNetworkArn", request.core_network_arn.is_some()),
        ("EgressOnlyInternetGatewayId", request.egress_only_internet_gateway_id.is_some()),
        ("LocalGatewayId", request.local_gateway_id.is_some()),
        ("OdbNetworkArn", request.odb_network_arn.is_some()),
        ("TransitGatewayId", request.transit_gateway_id.is_some()),
        ("VpcEndpointId", request.vpc_endpoint_id.is_some()),
    ])?;
    let id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
    let list = request.destination_prefix_list_id.as_deref();
    let list = only_list(list, request.destination_cidr_block.as_ref(), request.destination_ipv6_cidr_block.as_ref())?;
    let list = list.map(|list| prefix_list_route::destination(call, list)).transpose()?;
    let asked = Asked {
        gateway_id: request.gateway_id,
        nat_gateway_id: request.nat_gateway_id,
        network_interface_id: request.network_interface_id,
        instance_id: request.instance_id,
        vpc_peering_connection_id: request.vpc_peering_connection_id,
    };
    if let Some(list) = list {
        let target = target(call, &table, asked)?;
        return prefix_list_route::replace(call, &table, &list.id, target);
    }
    let destination = destination(request.destination_cidr_block, request.destination_ipv6_cidr_block.is_some())?;
    let local = local_blocks(call, &table);
    let is_local = local.contains(&destination);
    let back = request.local_target == Some(true) || asked.gateway_id.as_deref() == Some(LOCAL);
    if back && !is_local {
        return Err(ApiError::invalid_value(format!("The route {destination} has no local target: it is not a local route")));
    }
    let target = if back { None } else { Some(target(call, &table, asked)?) };
    if !is_local && !table.routes.iter().any(|route| route.destination == destination) {
        let message = format!("There is no route defined for '{destination}' in the route table. Use CreateRoute instead.");
        return Err(ApiError::invalid_value(message));
    }
    if let Some(target) = &target {
        check_inside(call, &table, &local, destination, target)?;
    }
    call.tx.update::<RouteTable>(&table.account_id, &id, |table| {
        let place = table.routes.iter_mut().find(|route| route.destination == destination);
        match (place, target) {
            (Some(route), Some(target)) => route.target = target,
            (None, Some(target)) => table.routes.push(Route { destination, target }),
            (_, None) => table.routes.retain(|route| route.destination != destination),
        }
    });
    Ok(())
}

/// DeleteRoute.
///
/// # Errors
/// `InvalidRoute.NotFound`, `InvalidParameterValue` for a local route.
pub fn delete_route(call: &mut Call<'_>, request: DeleteRouteRequest) -> Result<(), ApiError> {
    let id = ROUTE_TABLE.required(request.route_table_id, "RouteTableId")?;
    let table = ROUTE_TABLE.row::<RouteTable>(call, &id)?;
    let list = request.destination_prefix_list_id.as_deref();
    if let Some(list_id) = only_list(list, request.destination_cidr_block.as_ref(), request.destination_ipv6_cidr_block.as_ref())? {
        return prefix_list_route::remove(call, &table, list_id);
    }
    let destination = destination(request.destination_cidr_block, request.destination_ipv6_cidr_block.is_some())?;
    if local_blocks(call, &table).contains(&destination) {
        let message = format!("cannot remove local route {destination} in route table {id}");
        return Err(ApiError::invalid_value(message));
    }
    if !table.routes.iter().any(|route| route.destination == destination) {
        let message = format!("no route with destination-cidr-block {destination} in route table {id}");
        return Err(ApiError::new("InvalidRoute.NotFound", message));
    }
    call.tx.update::<RouteTable>(&table.account_id, &id, |table| table.routes.retain(|route| route.destination != destination));
    Ok(())
}

/// DescribeRouteTables.
///
/// # Errors
/// `InvalidRouteTableID.NotFound` and those of filters and pages.
pub fn describe_route_tables(call: &mut Call<'_>, request: DescribeRouteTablesRequest) -> Result<DescribeRouteTablesResult, ApiError> {
    let filters = Filters::new(request.filters, NAMES)?;
    let page = Page::new("DescribeRouteTables", request.max_results, request.next_token.as_deref(), 100)?;
    let rows = ROUTE_TABLE.rows::<RouteTable>(call, &request.route_table_ids)?;
    let passing = rows.into_iter().map(|(id, table)| (id, shape(call, &table))).filter(|(id, table)| {
        let tags = tag::of(&call.tx, call.account(), id);
        filters.pass(&tags, |name, test| field(table, name, test))
    });
    let (route_tables, next_token) = page.take(passing);
    Ok(DescribeRouteTablesResult { route_tables, next_token })
}

const NAMES: &[&str] = &[
    "association.gateway-id",
    "association.main",
    "association.route-table-association-id",
    "association.route-table-id",
    "association.subnet-id",
    "owner-id",
    "route-table-id",
    "route.destination-cidr-block",
    "route.destination-ipv6-cidr-block",
    "route.destination-prefix-list-id",
    "route.egress-only-internet-gateway-id",
    "route.gateway-id",
    "route.instance-id",
    "route.nat-gateway-id",
    "route.origin",
    "route.state",
    "route.transit-gateway-id",
    "route.vpc-peering-connection-id",
    "tag",
    "vpc-id",
];

fn field(table: &shapes::RouteTable, name: &str, test: &dyn Fn(&str) -> bool) -> bool {
    let is = |value: &Option<String>| value.as_ref().is_some_and(|value| test(value));
    let association = |test: &dyn Fn(&shapes::RouteTableAssociation) -> bool| table.associations.iter().any(test);
    let route = |test: &dyn Fn(&shapes::Route) -> bool| table.routes.iter().any(test);
    match name {
        "association.main" => association(&|association| test(if association.main == Some(true) { "true" } else { "false" })),
        "association.route-table-association-id" => association(&|association| is(&association.route_table_association_id)),
        "association.route-table-id" => association(&|association| is(&association.route_table_id)),
        "association.subnet-id" => association(&|association| is(&association.subnet_id)),
        "owner-id" => is(&table.owner_id),
        "route-table-id" => is(&table.route_table_id),
        "route.destination-cidr-block" => route(&|route| is(&route.destination_cidr_block)),
        "route.destination-prefix-list-id" => route(&|route| is(&route.destination_prefix_list_id)),
        "route.gateway-id" => route(&|route| is(&route.gateway_id)),
        "route.instance-id" => route(&|route| is(&route.instance_id)),
        "route.nat-gateway-id" => route(&|route| is(&route.nat_gateway_id)),
        "route.vpc-peering-connection-id" => route(&|route| is(&route.vpc_peering_connection_id)),
        "route.origin" => route(&|route| is(&route.origin)),
        "route.state" => route(&|route| is(&route.state)),
        "vpc-id" => is(&table.vpc_id),
        // No table is associated with a gateway, and no route leads anywhere else.
        _ => false,
    }
}

fn shape(call: &Call<'_>, table: &RouteTable) -> shapes::RouteTable {
    let association = |association: &RouteTableAssociation| shapes::RouteTableAssociation {
        route_table_association_id: Some(association.id.clone()),
        route_table_id: Some(table.id.clone()),
        subnet_id: association.subnet_id.clone(),
        main: Some(association.main),
        association_state: Some(associated()),
        ..Default::default()
    };
    let blocks = local_blocks(call, table);
    let replaced = |block: &&Ipv4Net| table.routes.iter().any(|route| route.destination == **block);
    let local = blocks.iter().filter(|block| !replaced(block)).map(|block| shapes::Route {
        destination_cidr_block: Some(block.to_string()),
        gateway_id: Some(LOCAL.into()),
        origin: Some("CreateRouteTable".into()),
        state: Some("active".into()),
        ..Default::default()
    });
    let made = |route: &Route| {
        // A local route stays the table's own, wherever it leads.
        let origin = if blocks.contains(&route.destination) { "CreateRouteTable" } else { "CreateRoute" };
        shapes::Route {
            destination_cidr_block: Some(route.destination.to_string()),
            origin: Some(origin.into()),
            state: Some(if is_active(&call.tx, table, route) { "active" } else { "blackhole" }.into()),
            ..target_shape(call, &route.target)
        }
    };
    let to_list = |route: &PrefixListRoute| shapes::Route {
        destination_cidr_block: None,
        destination_prefix_list_id: Some(route.prefix_list_id.clone()),
        ..made(&Route { destination: Ipv4Net::default(), target: route.target.clone() })
    };
    shapes::RouteTable {
        route_table_id: Some(table.id.clone()),
        vpc_id: Some(table.vpc_id.clone()),
        owner_id: Some(table.account_id.clone()),
        associations: table.associations.iter().map(association).collect(),
        routes: local.chain(table.routes.iter().map(made)).chain(table.prefix_list_routes.iter().map(to_list)).collect(),
        propagating_vgws: Vec::new(),
        tags: tag::shapes(&tag::of(&call.tx, &table.account_id, &table.id)),
    }
}

fn target_shape(call: &Call<'_>, target: &RouteTarget) -> shapes::Route {
    match target {
        RouteTarget::InternetGateway(id) => shapes::Route { gateway_id: Some(id.clone()), ..Default::default() },
        RouteTarget::NatGateway(id) => shapes::Route { nat_gateway_id: Some(id.clone()), ..Default::default() },
        RouteTarget::VpcPeeringConnection(id) => shapes::Route { vpc_peering_connection_id: Some(id.clone()), ..Default::default() },
        RouteTarget::NetworkInterface(id) => {
            let instance_id = call.get::<NetworkInterface>(id).and_then(|row| row.attachment.as_ref().map(|held| held.instance_id.clone()));
            shapes::Route {
                network_interface_id: Some(id.clone()),
                instance_owner_id: instance_id.as_ref().map(|_| call.account().to_owned()),
                instance_id,
                ..Default::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::{internet_gateway, prefix_list};
    use crate::shapes::{CreateSubnetRequest, CreateVpcRequest, DetachInternetGatewayRequest};

    struct Network {
        fixture: Fixture,
        vpc: String,
        subnet: String,
        table: String,
        gateway: String,
    }

    /// A VPC 10.0.0.0/16 with a subnet, a table of its own and an attached gateway.
    fn network() -> Network {
        let fixture = Fixture::new();
        let request = CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap();
        let request = CreateSubnetRequest { vpc_id: Some(vpc.clone()), cidr_block: Some("10.0.1.0/24".into()), ..Default::default() };
        let subnet = fixture.call(ALICE, |call| super::super::subnet::create_subnet(call, request)).unwrap();
        let table = new_table(&fixture, &vpc, None);
        let gateway = fixture.call(ALICE, |call| Ok(internet_gateway::insert(&mut call.tx, ALICE, Some(vpc.clone())))).unwrap();
        Network { subnet: subnet.subnet.unwrap().subnet_id.unwrap(), fixture, vpc, table, gateway }
    }

    fn new_table(fixture: &Fixture, vpc: &str, token: Option<&str>) -> String {
        let request = CreateRouteTableRequest { vpc_id: Some(vpc.into()), client_token: token.map(str::to_owned), ..Default::default() };
        let result = fixture.call(ALICE, |call| create_route_table(call, request)).unwrap();
        result.route_table.unwrap().route_table_id.unwrap()
    }

    fn route(table: &str, cidr: &str, gateway: &str) -> CreateRouteRequest {
        CreateRouteRequest {
            route_table_id: Some(table.into()),
            destination_cidr_block: Some(cidr.into()),
            gateway_id: Some(gateway.into()),
            ..Default::default()
        }
    }

    fn described(fixture: &Fixture, table: &str) -> shapes::RouteTable {
        let request = DescribeRouteTablesRequest { route_table_ids: vec![table.into()], ..Default::default() };
        fixture.call(ALICE, |call| describe_route_tables(call, request)).unwrap().route_tables.remove(0)
    }

    #[test]
    fn every_table_begins_with_the_local_route() {
        let network = network();
        let table = described(&network.fixture, &network.table);
        let [local] = table.routes.as_slice() else { panic!() };
        assert_eq!(local.destination_cidr_block.as_deref(), Some("10.0.0.0/16"));
        assert_eq!(local.gateway_id.as_deref(), Some("local"));
        assert_eq!((local.origin.as_deref(), local.state.as_deref()), (Some("CreateRouteTable"), Some("active")));
    }

    #[test]
    fn a_route_whose_gateway_leaves_is_a_black_hole() {
        let Network { fixture, vpc, table, gateway, .. } = network();
        fixture.call(ALICE, |call| create_route(call, route(&table, "0.0.0.0/0", &gateway))).unwrap();
        let state = || described(&fixture, &table).routes[1].state.clone().unwrap();
        assert_eq!(state(), "active");
        let request = DetachInternetGatewayRequest { internet_gateway_id: Some(gateway.clone()), vpc_id: Some(vpc), dry_run: None };
        fixture.call(ALICE, |call| internet_gateway::detach_internet_gateway(call, request)).unwrap();
        assert_eq!(state(), "blackhole");
        let refused = fixture.refusal(ALICE, |call| create_route(call, route(&table, "1.0.0.0/8", &gateway)));
        assert_eq!(refused, "InvalidParameterValue");
        let request = shapes::DeleteInternetGatewayRequest { internet_gateway_id: Some(gateway), dry_run: None };
        fixture.call(ALICE, |call| internet_gateway::delete_internet_gateway(call, request)).unwrap();
        assert_eq!(state(), "blackhole");
    }

    #[test]
    fn bad_routes_are_refused_with_ec2s_codes() {
        let Network { fixture, table, gateway, .. } = network();
        fixture.call(ALICE, |call| create_route(call, route(&table, "0.0.0.0/0", &gateway))).unwrap();
        let foreign = fixture.call(BOB, |call| Ok(internet_gateway::insert(&mut call.tx, BOB, None))).unwrap();
        let loose = fixture.call(ALICE, |call| Ok(internet_gateway::insert(&mut call.tx, ALICE, None))).unwrap();
        for (cidr, target, code) in [
            ("0.0.0.0/0", gateway.as_str(), "RouteAlreadyExists"),
            ("10.0.0.0/16", gateway.as_str(), "RouteAlreadyExists"),
            ("10.0.1.0/24", gateway.as_str(), "InvalidParameterValue"),
            ("10.0.0.0/40", gateway.as_str(), "InvalidParameterValue"),
            ("1.0.0.0/8", "igw-0123456789abcdef0", "InvalidGatewayID.NotFound"),
            ("1.0.0.0/8", foreign.as_str(), "InvalidGatewayID.NotFound"),
            ("1.0.0.0/8", loose.as_str(), "InvalidParameterValue"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_route(call, route(&table, cidr, target))), code, "{cidr} {target}");
        }
        let to = || route(&table, "1.0.0.0/8", &gateway);
        let id = |text: &str| Some(text.to_owned());
        for (request, code) in [
            (CreateRouteRequest { gateway_id: None, ..to() }, "MissingParameter"),
            (CreateRouteRequest { nat_gateway_id: id("nat-0123456789abcdef0"), ..to() }, "InvalidParameterCombination"),
            (CreateRouteRequest { gateway_id: id("local"), ..to() }, "InvalidParameterValue"),
            (CreateRouteRequest { transit_gateway_id: id("tgw-0123456789abcdef0"), ..to() }, "UnsupportedOperation"),
            (CreateRouteRequest { gateway_id: None, nat_gateway_id: id("nat-1"), ..to() }, "InvalidNatGatewayID.NotFound"),
            (CreateRouteRequest { gateway_id: None, instance_id: id("i-0123456789abcdef0"), ..to() }, "InvalidInstanceID.NotFound"),
            (
                CreateRouteRequest { gateway_id: None, network_interface_id: id("eni-0123456789abcdef0"), ..to() },
                "InvalidNetworkInterfaceID.NotFound",
            ),
            (
                CreateRouteRequest { gateway_id: None, vpc_peering_connection_id: id("pcx-0123456789abcdef0"), ..to() },
                "InvalidVpcPeeringConnectionID.NotFound",
            ),
        ] {
            let shown = format!("{request:?}");
            assert_eq!(fixture.refusal(ALICE, |call| create_route(call, request)), code, "{shown}");
        }
        let refused = fixture.refusal(BOB, |call| create_route(call, route(&table, "1.0.0.0/8", &foreign)));
        assert_eq!(refused, "InvalidRouteTableID.NotFound");
    }

    /// A route of the default VPC's main table.
    fn default_route(fixture: &Fixture, cidr: &str) -> CreateRouteRequest {
        let vpc = fixture.default_vpc(ALICE).id;
        let table = main(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        CreateRouteRequest { gateway_id: None, ..route(&table, cidr, "") }
    }

    #[test]
    fn a_route_to_an_instance_is_one_to_its_interface_and_active_while_that_is_attached() {
        let fixture = Fixture::new();
        let instance = "i-0123456789abcdef0";
        let interface = fixture.instance(ALICE, instance);
        let request = CreateRouteRequest { instance_id: Some(instance.into()), ..default_route(&fixture, "10.9.0.0/16") };
        let table = request.route_table_id.clone().unwrap();
        fixture.call(ALICE, |call| create_route(call, request)).unwrap();
        let shown = || described(&fixture, &table).routes.into_iter().find(|route| route.network_interface_id.is_some()).unwrap();
        assert_eq!(shown().network_interface_id.as_ref(), Some(&interface.id));
        assert_eq!((shown().instance_id.as_deref(), shown().instance_owner_id.as_deref()), (Some(instance), Some(ALICE)));
        assert_eq!(shown().state.as_deref(), Some("active"));
        fixture
            .call(ALICE, |call| {
                call.tx.update::<NetworkInterface>(ALICE, &interface.id, |interface| interface.attachment = None);
                Ok(())
            })
            .unwrap();
        assert_eq!(shown().state.as_deref(), Some("blackhole"));
        assert_eq!(shown().instance_id, None);
    }

    #[test]
    fn inside_the_vpc_only_whole_subnets_go_through_an_appliance() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, "i-0123456789abcdef0");
        let subnet = fixture.default_subnet(ALICE).cidr.to_string();
        let appliance =
            |cidr: &str| CreateRouteRequest { network_interface_id: Some(interface.id.clone()), ..default_route(&fixture, cidr) };
        let (part, whole) = (appliance("172.31.1.0/24"), appliance(&subnet));
        assert_eq!(fixture.refusal(ALICE, |call| create_route(call, part)), "InvalidParameterValue");
        fixture.call(ALICE, |call| create_route(call, whole)).unwrap();
        let local = appliance("172.31.0.0/16");
        let table = local.route_table_id.clone().unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| create_route(call, local)), "RouteAlreadyExists");
        let replace = |local_target, interface: Option<&String>| ReplaceRouteRequest {
            route_table_id: Some(table.clone()),
            destination_cidr_block: Some("172.31.0.0/16".into()),
            network_interface_id: interface.cloned(),
            local_target,
            ..Default::default()
        };
        let local = || {
            let routes = described(&fixture, &table).routes;
            let all: Vec<_> = routes.into_iter().filter(|route| route.destination_cidr_block.as_deref() == Some("172.31.0.0/16")).collect();
            let [route] = all.as_slice() else { panic!("{all:?}") };
            assert_eq!(route.origin.as_deref(), Some("CreateRouteTable"));
            (route.gateway_id.clone(), route.network_interface_id.clone())
        };
        fixture.call(ALICE, |call| replace_route(call, replace(None, Some(&interface.id)))).unwrap();
        assert_eq!(local(), (None, Some(interface.id.clone())));
        fixture.call(ALICE, |call| replace_route(call, replace(Some(true), None))).unwrap();
        assert_eq!(local(), (Some("local".into()), None));
    }

    #[test]
    fn routes_are_replaced_and_deleted() {
        let Network { fixture, table, gateway, .. } = network();
        let replace = |cidr: &str| ReplaceRouteRequest {
            route_table_id: Some(table.clone()),
            destination_cidr_block: Some(cidr.into()),
            gateway_id: Some(gateway.clone()),
            ..Default::default()
        };
        let delete = |cidr: &str| DeleteRouteRequest {
            route_table_id: Some(table.clone()),
            destination_cidr_block: Some(cidr.into()),
            ..Default::default()
        };
        assert_eq!(fixture.refusal(ALICE, |call| replace_route(call, replace("0.0.0.0/0"))), "InvalidParameterValue");
        fixture.call(ALICE, |call| create_route(call, route(&table, "0.0.0.0/0", &gateway))).unwrap();
        fixture.call(ALICE, |call| replace_route(call, replace("0.0.0.0/0"))).unwrap();
        fixture.call(ALICE, |call| delete_route(call, delete("0.0.0.0/0"))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| delete_route(call, delete("0.0.0.0/0"))), "InvalidRoute.NotFound");
        assert_eq!(fixture.refusal(ALICE, |call| delete_route(call, delete("10.0.0.0/16"))), "InvalidParameterValue");
    }

    #[test]
    fn a_subnet_uses_its_own_table_and_else_the_main_one() {
        let Network { fixture, vpc, subnet, table, .. } = network();
        let used = || {
            let tx = fixture.world.begin();
            let subnet = tx.get::<Subnet>(ALICE, &subnet).unwrap();
            of_subnet(&tx, &subnet).unwrap().id.clone()
        };
        let main_id = main(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        assert_eq!(used(), main_id);
        let associate = |table: &str| AssociateRouteTableRequest {
            route_table_id: Some(table.into()),
            subnet_id: Some(subnet.clone()),
            ..Default::default()
        };
        let association = fixture.call(ALICE, |call| associate_route_table(call, associate(&table))).unwrap().association_id.unwrap();
        assert_eq!(used(), table);
        assert_eq!(fixture.refusal(ALICE, |call| associate_route_table(call, associate(&main_id))), "Resource.AlreadyAssociated");
        let delete = DeleteRouteTableRequest { route_table_id: Some(table.clone()), dry_run: None };
        assert_eq!(fixture.refusal(ALICE, |call| delete_route_table(call, delete)), "DependencyViolation");
        let disassociate = |id: &str| DisassociateRouteTableRequest { association_id: Some(id.into()), dry_run: None };
        assert_eq!(
            fixture.refusal(BOB, |call| disassociate_route_table(call, disassociate(&association))),
            "InvalidAssociationID.NotFound"
        );
        fixture.call(ALICE, |call| disassociate_route_table(call, disassociate(&association))).unwrap();
        assert_eq!(used(), main_id);
    }

    #[test]
    fn the_main_association_moves_but_never_goes() {
        let Network { fixture, vpc, table, .. } = network();
        let old = main(&fixture.world.begin(), ALICE, &vpc).unwrap();
        let id = old.associations[0].id.clone();
        let disassociate = DisassociateRouteTableRequest { association_id: Some(id.clone()), dry_run: None };
        assert_eq!(fixture.refusal(ALICE, |call| disassociate_route_table(call, disassociate)), "InvalidParameterValue");
        let replace = |id: &str, table: &str| ReplaceRouteTableAssociationRequest {
            association_id: Some(id.into()),
            route_table_id: Some(table.into()),
            dry_run: None,
        };
        let result = fixture.call(ALICE, |call| replace_route_table_association(call, replace(&id, &table))).unwrap();
        assert_eq!(main(&fixture.world.begin(), ALICE, &vpc).unwrap().id, table);
        let again = fixture.refusal(ALICE, |call| replace_route_table_association(call, replace(&id, &table)));
        assert_eq!(again, "InvalidAssociationID.NotFound");
        let default_vpc = fixture.default_vpc(ALICE).id;
        let other = main(&fixture.world.begin(), ALICE, &default_vpc).unwrap().id.clone();
        let new = result.new_association_id.unwrap();
        let refused = fixture.refusal(ALICE, |call| replace_route_table_association(call, replace(&new, &other)));
        assert_eq!(refused, "InvalidParameterValue");
    }

    #[test]
    fn a_prefix_list_is_one_route_that_counts_with_its_largest_size() {
        let Network { fixture, table, gateway, .. } = network();
        let list = |size: i32| {
            let request = shapes::CreateManagedPrefixListRequest {
                prefix_list_name: Some("offices".into()),
                address_family: Some("IPv4".into()),
                max_entries: Some(size),
                ..Default::default()
            };
            let made = fixture.call(ALICE, |call| prefix_list::create_managed_prefix_list(call, request)).unwrap();
            made.prefix_list.unwrap().prefix_list_id.unwrap()
        };
        let to = |list: &str| CreateRouteRequest {
            route_table_id: Some(table.clone()),
            destination_prefix_list_id: Some(list.into()),
            gateway_id: Some(gateway.clone()),
            ..Default::default()
        };
        let (one, two) = (list(499), list(2));
        fixture.call(ALICE, |call| create_route(call, to(&one))).unwrap();
        let shown = described(&fixture, &table).routes.pop().unwrap();
        assert_eq!((shown.destination_prefix_list_id.as_ref(), shown.destination_cidr_block), (Some(&one), None));
        assert_eq!((shown.gateway_id.as_ref(), shown.state.as_deref()), (Some(&gateway), Some("active")));
        let both = CreateRouteRequest { destination_cidr_block: Some("1.0.0.0/8".into()), ..to(&two) };
        for (request, code) in [
            (to(&one), "RouteAlreadyExists"),
            (to(&two), "RouteLimitExceeded"),
            (to("pl-0123456789abcdef0"), "InvalidPrefixListID.NotFound"),
            (both, "InvalidParameterCombination"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_route(call, request)), code);
        }
        fixture.call(ALICE, |call| create_route(call, route(&table, "1.0.0.0/8", &gateway))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| create_route(call, route(&table, "2.0.0.0/8", &gateway))), "RouteLimitExceeded");
        let delete = |list: &str| DeleteRouteRequest {
            route_table_id: Some(table.clone()),
            destination_prefix_list_id: Some(list.into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| delete_route(call, delete(&one))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| delete_route(call, delete(&one))), "InvalidRoute.NotFound");
        let request = ReplaceRouteRequest {
            route_table_id: Some(table.clone()),
            destination_prefix_list_id: Some(one),
            gateway_id: Some(gateway.clone()),
            ..Default::default()
        };
        assert_eq!(fixture.refusal(ALICE, |call| replace_route(call, request)), "InvalidParameterValue");
    }

    #[test]
    fn a_client_token_makes_one_table() {
        let Network { fixture, vpc, .. } = network();
        let one = new_table(&fixture, &vpc, Some("token"));
        assert_eq!(new_table(&fixture, &vpc, Some("token")), one);
        assert_ne!(new_table(&fixture, &vpc, Some("other")), one);
        let request = CreateRouteTableRequest {
            vpc_id: Some(fixture.default_vpc(ALICE).id),
            client_token: Some("token".into()),
            ..Default::default()
        };
        assert_eq!(fixture.refusal(ALICE, |call| create_route_table(call, request)), "IdempotentParameterMismatch");
    }
}
