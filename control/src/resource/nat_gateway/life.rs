//! What the reconciler does with NAT gateways: placement, and the moves that follow from what cards report.
//!
//! A gateway keeps no state that outlives its connections, so it can begin anew on another card: it moves when its card was lost for
//! good (`abandon`). The card that comes back is told to forget it, like everything that it should not hold.

use std::sync::Arc;

use crate::model::{Address, NatGateway, NatGatewayAddressState, NatGatewayState, NetworkInterface, StateReason, Time};
use crate::placement;
use crate::resource::{network_interface, tag};
use crate::world::Tx;

/// How long a gateway that ended stays visible.
const VISIBLE_MS: u64 = 60 * 60 * 1000;

/// Gateways without a card: those that can work are placed, those that cannot come to their end.
pub(crate) fn settle(tx: &mut Tx<'_>, now: Time) {
    for row in tx.find_all::<NatGateway>("unplaced", "") {
        if !super::is_usable(&row) {
            end(tx, now, &row);
        } else if let Some(card_id) = placement::gateway_card(tx, &row.zone) {
            tracing::info!(gateway = row.id, card = card_id, "NAT gateway placed");
            tx.update::<NatGateway>(&row.account_id, &row.id, |row| row.card_id = Some(card_id));
        }
    }
}

/// Takes the gateways off a card that is lost for good.
pub(crate) fn abandon(tx: &mut Tx<'_>, card_id: &str) {
    for row in tx.find_all::<NatGateway>("card", card_id) {
        tracing::warn!(gateway = row.id, card = card_id, "NAT gateway leaves a lost card");
        tx.update::<NatGateway>(&row.account_id, &row.id, |row| row.card_id = None);
    }
}

/// The card does what the row says: a new gateway is available, new addresses are in use and old ones free.
pub(crate) fn ready(tx: &mut Tx<'_>, row: &NatGateway) {
    let mut new = row.clone();
    if new.state == NatGatewayState::Pending {
        new.state = NatGatewayState::Available;
    }
    for address in &mut new.addresses {
        if address.state == NatGatewayAddressState::Associating {
            address.state = NatGatewayAddressState::Succeeded;
        }
    }
    new.addresses.retain(|address| address.state != NatGatewayAddressState::Disassociating);
    if new == *row {
        return;
    }
    for gone in row.addresses.iter().filter(|address| address.state == NatGatewayAddressState::Disassociating) {
        tx.update::<Address>(&row.account_id, &gone.allocation_id, |address| address.association = None);
        if let (Some(interface_id), Some(private_ip)) = (&row.network_interface_id, gone.private_ip) {
            tx.update::<NetworkInterface>(&row.account_id, interface_id, |interface| {
                interface.secondary_ips.retain(|ip| *ip != private_ip);
            });
        }
    }
    tx.put(new);
}

/// The card cannot do it: a new gateway fails, in EC2's words.
pub(crate) fn broken(tx: &mut Tx<'_>, row: &NatGateway) {
    let interface = row.network_interface_id.as_deref().unwrap_or_default();
    let message =
        format!("Network interface {interface}, created and used internally by this NAT gateway is in an invalid state. Please try again.");
    let failure = StateReason { code: "InternalError".to_owned(), message };
    tx.update::<NatGateway>(&row.account_id, &row.id, |row| row.failure = Some(failure));
}

/// No card holds it any more: its interface goes and its Elastic IPs are free.
pub(crate) fn end(tx: &mut Tx<'_>, now: Time, row: &Arc<NatGateway>) {
    if let Some(interface_id) = &row.network_interface_id {
        network_interface::remove(tx, &row.account_id, interface_id);
    }
    tx.update::<NatGateway>(&row.account_id, &row.id, |row| {
        row.state = if row.state == NatGatewayState::Deleting { NatGatewayState::Deleted } else { NatGatewayState::Failed };
        row.network_interface_id = None;
        row.card_id = None;
        row.ended = Some(now);
    });
}

/// Forgets gateways that ended an hour ago.
pub(crate) fn expire(tx: &mut Tx<'_>, now: Time) {
    let old = tx.all::<NatGateway>().filter(|row| row.ended.is_some_and(|at| VISIBLE_MS < now.since_ms(at)));
    let old: Vec<_> = old.map(|row| (row.account_id.clone(), row.id.clone())).collect();
    for (account, id) in old {
        tag::remove(tx, &account, &id);
        tx.delete::<NatGateway>(&account, &id);
    }
}
