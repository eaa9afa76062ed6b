//! VPC peering connections: a way between two VPCs of this region, of one account or of two.
//!
//! ```text
//! (initiating-request) -> pending-acceptance -> active -> deleted
//!          |                 |      |   `-> deleted
//!          v                 v      v
//!        failed          rejected  expired
//! ```
//!
//! The requester asks and the accepter accepts, also where both are the same account; seven days later the question lapses. A
//! connection to a VPC that is not there, or whose blocks overlap with the requester's, fails: the requester learns no more than that.
//! What came to an end is shown for two hours to the account that ended it and for two days to the other.
//!
//! Peering is not transitive: only ports of the two VPCs reach each other, and only where a route says so.

use std::sync::Arc;

use ipnet::Ipv4Net;

use super::filter::{Filters, Page};
use super::id::{VPC, VPC_PEERING_CONNECTION};
use super::{tag, vpc};
use crate::error::ApiError;
use crate::model::{PeeringSide, PeeringState, REGION, Time, Vpc, VpcPeeringConnection};
use crate::shape::Timestamp;
use crate::shapes::{
    self, AcceptVpcPeeringConnectionRequest, AcceptVpcPeeringConnectionResult, CidrBlock, CreateVpcPeeringConnectionRequest,
    CreateVpcPeeringConnectionResult, DeleteVpcPeeringConnectionRequest, DeleteVpcPeeringConnectionResult,
    DescribeVpcPeeringConnectionsRequest, DescribeVpcPeeringConnectionsResult, ModifyVpcPeeringConnectionOptionsRequest,
    ModifyVpcPeeringConnectionOptionsResult, PeeringConnectionOptions, PeeringConnectionOptionsRequest, RejectVpcPeeringConnectionRequest,
    RejectVpcPeeringConnectionResult, VpcPeeringConnectionOptionsDescription, VpcPeeringConnectionStateReason, VpcPeeringConnectionVpcInfo,
};
use crate::world::{Call, Tx};

/// The most active connections of a VPC.
const MOST_ACTIVE: usize = 50;
/// The most requests of an account that wait for an answer.
const MOST_PENDING: usize = 25;
const HOUR_MS: u64 = 60 * 60 * 1000;
/// How long a request waits for an answer.
const ANSWER_WITHIN_MS: u64 = 7 * 24 * HOUR_MS;
/// How long an ended connection is shown to the account that ended it, and to the other.
const VISIBLE_TO_ENDER_MS: u64 = 2 * HOUR_MS;
const VISIBLE_MS: u64 = 48 * HOUR_MS;

/// CreateVpcPeeringConnection. The same request that waits already is returned as it is.
///
/// # Errors
/// `InvalidVpcID.NotFound` for a VPC of this account, `VpcPeeringConnectionAlreadyExists`,
/// `OutstandingVpcPeeringConnectionLimitExceeded`, `UnsupportedOperation` for another region, those of tags.
pub fn create_vpc_peering_connection(
    call: &mut Call<'_>,
    request: CreateVpcPeeringConnectionRequest,
) -> Result<CreateVpcPeeringConnectionResult, ApiError> {
    if request.peer_region.as_ref().is_some_and(|region| *region != call.region.name) {
        return Err(ApiError::new("UnsupportedOperation", "VPC peering connections to other regions are not supported in this region"));
    }
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let peer_vpc_id = VPC.required(request.peer_vpc_id, "PeerVpcId")?;
    let account = call.account().to_owned();
    let peer_account = request.peer_owner_id.filter(|id| !id.is_empty()).unwrap_or_else(|| account.clone());
    if peer_account.len() != 12 || !peer_account.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ApiError::invalid_parameter("peerOwnerId", &peer_account));
    }
    let own = VPC.row::<Vpc>(call, &vpc_id)?;
    if vpc_id == peer_vpc_id {
        return Err(ApiError::invalid_value(format!("The VPC {vpc_id} cannot be peered with itself")));
    }
    let peer = call.tx.get::<Vpc>(&peer_account, &peer_vpc_id);
    if peer.is_none() && peer_account == account {
        return Err(VPC.not_found(&peer_vpc_id));
    }
    let tags = tag::specified(request.tag_specifications, &VPC_PEERING_CONNECTION)?;
    for row in rows_of(&call.tx, &vpc_id) {
        let open = matches!(state(&row, call.now), PeeringState::PendingAcceptance | PeeringState::Active);
        if !open || other(&row, &vpc_id).vpc_id != peer_vpc_id {
            continue;
        }
        if row.state == PeeringState::PendingAcceptance && row.requester.vpc_id == vpc_id {
            return Ok(CreateVpcPeeringConnectionResult { vpc_peering_connection: Some(shape(call, &row)) });
        }
        let message = format!("A VPC peering connection between {vpc_id} and {peer_vpc_id} already exists: {}", row.id);
        return Err(ApiError::new("VpcPeeringConnectionAlreadyExists", message));
    }
    let waits =
        |row: &&Arc<VpcPeeringConnection>| row.requester.account_id == account && state(row, call.now) == PeeringState::PendingAcceptance;
    if call.tx.find::<VpcPeeringConnection>(REGION, "account", &account).iter().filter(waits).count() >= MOST_PENDING {
        let message = "The maximum number of outstanding VPC peering connection requests has been reached.";
        return Err(ApiError::new("OutstandingVpcPeeringConnectionLimitExceeded", message));
    }
    let possible = peer.is_some_and(|peer| !overlap(&own, &peer));
    let row = VpcPeeringConnection {
        id: call.tx.new_id(VPC_PEERING_CONNECTION.prefix),
        requester: PeeringSide { account_id: account.clone(), vpc_id, cidrs: blocks(&own), remote_dns: false },
        accepter: PeeringSide { account_id: peer_account.clone(), vpc_id: peer_vpc_id, cidrs: Vec::new(), remote_dns: false },
        state: if possible { PeeringState::PendingAcceptance } else { PeeringState::Failed },
        created: call.now,
        ended: (!possible).then(|| (call.now, account.clone())),
    };
    call.tx.put(row.clone());
    tag::set(&mut call.tx, &account, &VPC_PEERING_CONNECTION, &row.id, tags);
    // The request is on its way; what becomes of it is for Describe to tell.
    let status = VpcPeeringConnectionStateReason {
        code: Some("initiating-request".into()),
        message: Some(format!("Initiating Request to {peer_account}")),
    };
    let shape = shapes::VpcPeeringConnection { status: Some(status), ..shape(call, &row) };
    Ok(CreateVpcPeeringConnectionResult { vpc_peering_connection: Some(shape) })
}

fn blocks(vpc: &Vpc) -> Vec<Ipv4Net> {
    vpc::cidrs(vpc).map(|(_, cidr)| cidr).collect()
}

fn overlap(a: &Vpc, b: &Vpc) -> bool {
    vpc::cidrs(a).any(|(_, a)| vpc::cidrs(b).any(|(_, b)| a.contains(&b) || b.contains(&a)))
}

/// The state of a connection at a moment: a request lapses by itself.
fn state(row: &VpcPeeringConnection, now: Time) -> PeeringState {
    let lapsed = row.state == PeeringState::PendingAcceptance && ANSWER_WITHIN_MS <= now.since_ms(row.created);
    if lapsed { PeeringState::Expired } else { row.state }
}

fn rows_of(tx: &Tx<'_>, vpc_id: &str) -> Vec<Arc<VpcPeeringConnection>> {
    tx.find::<VpcPeeringConnection>(REGION, "vpc", vpc_id)
}

/// The active connections of a VPC.
pub fn active(tx: &Tx<'_>, vpc_id: &str) -> Vec<Arc<VpcPeeringConnection>> {
    let mut rows = rows_of(tx, vpc_id);
    rows.retain(|row| row.state == PeeringState::Active);
    rows
}

/// The active connection between two VPCs.
pub fn between(tx: &Tx<'_>, a: &str, b: &str) -> Option<Arc<VpcPeeringConnection>> {
    active(tx, a).into_iter().find(|row| other(row, a).vpc_id == b)
}

/// The side of a connection that is not this VPC.
pub fn other<'a>(row: &'a VpcPeeringConnection, vpc_id: &str) -> &'a PeeringSide {
    if row.requester.vpc_id == vpc_id { &row.accepter } else { &row.requester }
}

/// The name of the state of a connection that rules or routes still name; one that is forgotten was deleted.
pub fn state_name(tx: &Tx<'_>, id: &str) -> &'static str {
    tx.get::<VpcPeeringConnection>(REGION, id).map_or(PeeringState::Deleted, |row| row.state).name()
}

/// Whether an account may know of a connection at a moment.
fn is_visible(row: &VpcPeeringConnection, account: &str, now: Time) -> bool {
    if row.requester.account_id != account && row.accepter.account_id != account {
        return false;
    }
    match &row.ended {
        None => now.since_ms(row.created) < ANSWER_WITHIN_MS.saturating_add(VISIBLE_MS) || row.state == PeeringState::Active,
        Some(_) if row.state == PeeringState::Failed && row.requester.account_id != account => false,
        Some((at, by)) => now.since_ms(*at) < if by == account { VISIBLE_TO_ENDER_MS } else { VISIBLE_MS },
    }
}

/// A connection that the asking account is a side of.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about the id.
pub fn row(call: &Call<'_>, id: &str) -> Result<Arc<VpcPeeringConnection>, ApiError> {
    VPC_PEERING_CONNECTION.check(id)?;
    let row = call.tx.get::<VpcPeeringConnection>(REGION, id).filter(|row| is_visible(row, call.account(), call.now));
    row.ok_or_else(|| VPC_PEERING_CONNECTION.not_found(id))
}

fn wrong_state(id: &str) -> ApiError {
    ApiError::new("InvalidStateTransition", format!("VpcPeeringConnectionID {id} is not in the correct state for the request."))
}

fn not_permitted(account: &str, verb: &str, id: &str) -> ApiError {
    ApiError::new("OperationNotPermitted", format!("User {account} cannot {verb} peering {id}"))
}

/// A request that the asking account may answer.
fn to_answer(call: &Call<'_>, id: Option<String>, verb: &str) -> Result<Arc<VpcPeeringConnection>, ApiError> {
    let id = VPC_PEERING_CONNECTION.required(id, "VpcPeeringConnectionId")?;
    let row = row(call, &id)?;
    if row.accepter.account_id != call.account() {
        return Err(not_permitted(call.account(), verb, &id));
    }
    if state(&row, call.now) != PeeringState::PendingAcceptance {
        return Err(wrong_state(&id));
    }
    Ok(row)
}

/// AcceptVpcPeeringConnection.
///
/// # Errors
/// `OperationNotPermitted` for another account than the accepter, `InvalidStateTransition` for what does not wait,
/// `VpcPeeringConnectionsPerVpcLimitExceeded`.
pub fn accept_vpc_peering_connection(
    call: &mut Call<'_>,
    request: AcceptVpcPeeringConnectionRequest,
) -> Result<AcceptVpcPeeringConnectionResult, ApiError> {
    let row = to_answer(call, request.vpc_peering_connection_id, "accept")?;
    let own = call.get::<Vpc>(&row.accepter.vpc_id).ok_or_else(|| wrong_state(&row.id))?;
    for vpc_id in [&row.requester.vpc_id, &row.accepter.vpc_id] {
        if active(&call.tx, vpc_id).len() >= MOST_ACTIVE {
            let message = format!("The maximum number of active VPC peering connections has been reached for vpc '{vpc_id}'.");
            return Err(ApiError::new("VpcPeeringConnectionsPerVpcLimitExceeded", message));
        }
    }
    let mut accepted = VpcPeeringConnection::clone(&row);
    accepted.state = PeeringState::Active;
    accepted.accepter.cidrs = blocks(&own);
    call.tx.put(accepted.clone());
    Ok(AcceptVpcPeeringConnectionResult { vpc_peering_connection: Some(shape(call, &accepted)) })
}

/// RejectVpcPeeringConnection.
///
/// # Errors
/// `OperationNotPermitted` for another account than the accepter, `InvalidStateTransition` for what does not wait.
pub fn reject_vpc_peering_connection(
    call: &mut Call<'_>,
    request: RejectVpcPeeringConnectionRequest,
) -> Result<RejectVpcPeeringConnectionResult, ApiError> {
    let row = to_answer(call, request.vpc_peering_connection_id, "reject")?;
    let (now, account) = (call.now, call.account().to_owned());
    end(&mut call.tx, &row.id, PeeringState::Rejected, now, &account);
    Ok(RejectVpcPeeringConnectionResult { r#return: Some(true) })
}

/// DeleteVpcPeeringConnection: either side deletes an active connection, the requester also its request. Routes over it become black
/// holes and rules that name its groups stale.
///
/// # Errors
/// `InvalidStateTransition`, `OperationNotPermitted` for a request that the account should reject instead.
pub fn delete_vpc_peering_connection(
    call: &mut Call<'_>,
    request: DeleteVpcPeeringConnectionRequest,
) -> Result<DeleteVpcPeeringConnectionResult, ApiError> {
    let id = VPC_PEERING_CONNECTION.required(request.vpc_peering_connection_id, "VpcPeeringConnectionId")?;
    let row = row(call, &id)?;
    match state(&row, call.now) {
        PeeringState::Active => {}
        PeeringState::PendingAcceptance if row.requester.account_id == call.account() => {}
        PeeringState::PendingAcceptance => return Err(not_permitted(call.account(), "delete", &id)),
        _ => return Err(wrong_state(&id)),
    }
    let (now, account) = (call.now, call.account().to_owned());
    end(&mut call.tx, &id, PeeringState::Deleted, now, &account);
    Ok(DeleteVpcPeeringConnectionResult { r#return: Some(true) })
}

fn end(tx: &mut Tx<'_>, id: &str, state: PeeringState, now: Time, by: &str) {
    tx.update::<VpcPeeringConnection>(REGION, id, |row| {
        row.state = state;
        row.ended = Some((now, by.to_owned()));
    });
}

/// Ends the requests of and to a VPC that goes.
pub fn withdraw(tx: &mut Tx<'_>, vpc_id: &str, now: Time, by: &str) {
    for row in rows_of(tx, vpc_id) {
        if row.state == PeeringState::PendingAcceptance {
            end(tx, &row.id, PeeringState::Deleted, now, by);
        }
    }
}

/// Lapses requests that nobody answered, and forgets what nobody sees any more.
pub fn expire(tx: &mut Tx<'_>, now: Time) {
    let rows: Vec<_> = tx.list::<VpcPeeringConnection>(REGION).filter(|row| row.state != PeeringState::Active).cloned().collect();
    for row in rows {
        let sides = [&row.requester.account_id, &row.accepter.account_id];
        if !sides.iter().any(|account| is_visible(&row, account, now)) {
            for account in sides {
                tag::remove(tx, account, &row.id);
            }
            tx.delete::<VpcPeeringConnection>(REGION, &row.id);
        } else if row.ended.is_none() && state(&row, now) == PeeringState::Expired {
            end(tx, &row.id, PeeringState::Expired, row.created.plus_ms(ANSWER_WITHIN_MS), "");
        }
    }
}

/// ModifyVpcPeeringConnectionOptions: each account changes its own side.
///
/// # Errors
/// `InvalidStateTransition` when it is not active, `OperationNotPermitted` for the other side,
/// `InvalidVpcPeeringConnectionState.DnsHostnamesDisabled`, `UnsupportedOperation` for ClassicLink.
pub fn modify_vpc_peering_connection_options(
    call: &mut Call<'_>,
    request: ModifyVpcPeeringConnectionOptionsRequest,
) -> Result<ModifyVpcPeeringConnectionOptionsResult, ApiError> {
    let id = VPC_PEERING_CONNECTION.required(request.vpc_peering_connection_id, "VpcPeeringConnectionId")?;
    let row = row(call, &id)?;
    let (accepter, requester) = (request.accepter_peering_connection_options, request.requester_peering_connection_options);
    if accepter.is_none() && requester.is_none() {
        return Err(ApiError::new("MissingParameter", "Options of the accepter or of the requester must be specified"));
    }
    if state(&row, call.now) != PeeringState::Active {
        return Err(wrong_state(&id));
    }
    let mut changed = VpcPeeringConnection::clone(&row);
    for (side, options) in [(&mut changed.accepter, &accepter), (&mut changed.requester, &requester)] {
        let Some(options) = options else { continue };
        if side.account_id != call.account() {
            return Err(not_permitted(call.account(), "modify the options of the other side of", &id));
        }
        check_options(options)?;
        if let Some(on) = options.allow_dns_resolution_from_remote_vpc {
            side.remote_dns = on;
        }
    }
    let turned_on = changed.accepter.remote_dns || changed.requester.remote_dns;
    let named =
        |side: &PeeringSide| call.tx.get::<Vpc>(&side.account_id, &side.vpc_id).is_some_and(|vpc| vpc.dns_hostnames && vpc.dns_support);
    if turned_on && !(named(&row.requester) && named(&row.accepter)) {
        let message = format!("To resolve names over {id}, both VPCs need DNS host names and DNS support");
        return Err(ApiError::new("InvalidVpcPeeringConnectionState.DnsHostnamesDisabled", message));
    }
    let shape = |side: &PeeringSide| PeeringConnectionOptions {
        allow_dns_resolution_from_remote_vpc: Some(side.remote_dns),
        allow_egress_from_local_classic_link_to_remote_vpc: Some(false),
        allow_egress_from_local_vpc_to_remote_classic_link: Some(false),
    };
    let result = ModifyVpcPeeringConnectionOptionsResult {
        accepter_peering_connection_options: accepter.map(|_| shape(&changed.accepter)),
        requester_peering_connection_options: requester.map(|_| shape(&changed.requester)),
    };
    call.tx.put(changed);
    Ok(result)
}

/// EC2 has retired ClassicLink: turning it off changes nothing.
fn check_options(options: &PeeringConnectionOptionsRequest) -> Result<(), ApiError> {
    super::id::unsupported(&[
        ("AllowEgressFromLocalClassicLinkToRemoteVpc", options.allow_egress_from_local_classic_link_to_remote_vpc == Some(true)),
        ("AllowEgressFromLocalVpcToRemoteClassicLink", options.allow_egress_from_local_vpc_to_remote_classic_link == Some(true)),
    ])
}

/// DescribeVpcPeeringConnections: those of which the account is a side.
///
/// # Errors
/// `InvalidVpcPeeringConnectionID.NotFound` and those of filters and pages.
pub fn describe_vpc_peering_connections(
    call: &mut Call<'_>,
    request: DescribeVpcPeeringConnectionsRequest,
) -> Result<DescribeVpcPeeringConnectionsResult, ApiError> {
    let names = [
        "accepter-vpc-info.cidr-block",
        "accepter-vpc-info.owner-id",
        "accepter-vpc-info.vpc-id",
        "expiration-time",
        "requester-vpc-info.cidr-block",
        "requester-vpc-info.owner-id",
        "requester-vpc-info.vpc-id",
        "status-code",
        "status-message",
        "tag",
        "vpc-peering-connection-id",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let page = Page::new("DescribeVpcPeeringConnections", request.max_results, request.next_token.as_deref(), 1000)?;
    let mut rows = Vec::new();
    if request.vpc_peering_connection_ids.is_empty() {
        rows = call.tx.find::<VpcPeeringConnection>(REGION, "account", call.account());
        rows.retain(|row| is_visible(row, call.account(), call.now));
    }
    for id in &request.vpc_peering_connection_ids {
        rows.push(row(call, id)?);
    }
    rows.sort_by(|a, b| a.id.cmp(&b.id));
    rows.dedup_by(|a, b| a.id == b.id);
    let passing = rows.into_iter().filter(|row| {
        let side = |side: &PeeringSide, field: &str, test: &dyn Fn(&str) -> bool| match field {
            "cidr-block" => side.cidrs.iter().any(|cidr| test(&cidr.to_string())),
            "owner-id" => test(&side.account_id),
            _ => test(&side.vpc_id),
        };
        let state = state(row, call.now);
        filters.pass(&tag::of(&call.tx, call.account(), &row.id), |name, test| match name.split_once('.') {
            Some(("accepter-vpc-info", field)) => side(&row.accepter, field, test),
            Some(("requester-vpc-info", field)) => side(&row.requester, field, test),
            _ => match name {
                "expiration-time" => expiration(row, state).is_some_and(|time| test(&time.to_text())),
                "status-code" => test(state.name()),
                "status-message" => test(&message(row, state)),
                "vpc-peering-connection-id" => test(&row.id),
                _ => false,
            },
        })
    });
    let (page, next_token) = page.take(passing.map(|row| (row.id.clone(), row)));
    let vpc_peering_connections = page.iter().map(|row| shape(call, row)).collect();
    Ok(DescribeVpcPeeringConnectionsResult { vpc_peering_connections, next_token })
}

/// When a request lapses or lapsed.
fn expiration(row: &VpcPeeringConnection, state: PeeringState) -> Option<Timestamp> {
    matches!(state, PeeringState::PendingAcceptance | PeeringState::Expired).then(|| row.created.plus_ms(ANSWER_WITHIN_MS).into())
}

fn message(row: &VpcPeeringConnection, state: PeeringState) -> String {
    let by = row.ended.as_ref().map_or("", |(_, by)| by);
    match state {
        PeeringState::PendingAcceptance => format!("Pending Acceptance by {}", row.accepter.account_id),
        PeeringState::Active => "Active".to_owned(),
        PeeringState::Failed => "Failed due to incorrect VPC-ID, Account ID, or overlapping CIDR range".to_owned(),
        PeeringState::Rejected => format!("Rejected by {by}"),
        PeeringState::Expired => "Expired".to_owned(),
        PeeringState::Deleted => format!("Deleted by {by}"),
    }
}

fn shape(call: &Call<'_>, row: &VpcPeeringConnection) -> shapes::VpcPeeringConnection {
    let state = state(row, call.now);
    let side = |side: &PeeringSide| VpcPeeringConnectionVpcInfo {
        cidr_block: side.cidrs.first().map(Ipv4Net::to_string),
        cidr_block_set: side.cidrs.iter().map(|cidr| CidrBlock { cidr_block: Some(cidr.to_string()) }).collect(),
        owner_id: Some(side.account_id.clone()),
        vpc_id: Some(side.vpc_id.clone()),
        region: Some(call.region.name.clone()),
        peering_options: Some(VpcPeeringConnectionOptionsDescription {
            allow_dns_resolution_from_remote_vpc: Some(side.remote_dns),
            allow_egress_from_local_classic_link_to_remote_vpc: Some(false),
            allow_egress_from_local_vpc_to_remote_classic_link: Some(false),
        }),
        ..Default::default()
    };
    shapes::VpcPeeringConnection {
        vpc_peering_connection_id: Some(row.id.clone()),
        requester_vpc_info: Some(side(&row.requester)),
        accepter_vpc_info: Some(side(&row.accepter)),
        expiration_time: expiration(row, state),
        status: Some(VpcPeeringConnectionStateReason { code: Some(state.name().into()), message: Some(message(row, state)) }),
        tags: tag::shapes(&tag::of(&call.tx, call.account(), &row.id)),
    }
}

#[cfg(test)]
mod tests;
