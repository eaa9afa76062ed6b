//! Which cards a changed row is about.
//!
//! A card is touched when what it shall hold may have changed, and no more cards than those: a VPC is in the picture of the cards
//! that hold its [`card_proto::card::Network`], which are those with a port or a gateway in it or in a VPC that it is peered with.
//! A card that is about to hold a VPC for the first time is found by the row that brings it there, which names the card.
//!
//! A row is looked at under all keys that it had in the change: a port that left a VPC touches that VPC, too.

use std::collections::BTreeSet;

use crate::model::{
    AccessKey, Account, Address, Card, CardObject, ClientToken, Counter, DhcpOptions, Event, Image, Instance, InternetGateway, KeyPair,
    NatGateway, NetworkAcl, NetworkInterface, PrefixList, PrefixListVersion, PublicIp, REGION, RouteTable, SecurityGroup, Subnet, Tags,
    Volume, Vpc, VpcPeeringConnection,
};
use crate::world::{Dirty, Row as _, Tx};

/// Every card that may have to do with anything.
pub(super) fn all(tx: &Tx<'_>) -> BTreeSet<String> {
    let mut cards: BTreeSet<String> = tx.all::<Card>().map(|card| card.id.clone()).collect();
    cards.extend(tx.all::<CardObject>().map(|row| row.card_id.clone()));
    cards.extend(tx.all::<Instance>().filter_map(|row| row.placement.as_ref()).map(|placement| placement.card_id.clone()));
    cards.extend(tx.all::<Volume>().map(|row| row.card_id.clone()));
    cards.extend(tx.all::<NatGateway>().filter_map(|row| row.card_id.clone()));
    cards
}

/// The cards that changed rows are about.
pub(super) fn cards(tx: &Tx<'_>, dirty: &Dirty) -> BTreeSet<String> {
    let mut touch = Touch { tx, cards: BTreeSet::new(), vpcs: BTreeSet::new() };
    for ((kind, account, id), keys) in dirty {
        match *kind {
            // Rows that no object is made of, and those that cards and this loop write.
            Account::KIND
            | AccessKey::KIND
            | Card::KIND
            | CardObject::KIND
            | ClientToken::KIND
            | Counter::KIND
            | Event::KIND
            | Image::KIND
            | KeyPair::KIND
            | PrefixListVersion::KIND
            | PublicIp::KIND => continue,
            Tags::KIND => touch.object(account, id),
            Vpc::KIND => touch.vpc(id),
            DhcpOptions::KIND => tx.find::<Vpc>(account, "dhcp", id).iter().for_each(|vpc| touch.vpc(&vpc.id)),
            PrefixList::KIND => {
                tx.find::<RouteTable>(account, "prefix_list", id).iter().for_each(|table| touch.vpc(&table.vpc_id));
                tx.find::<SecurityGroup>(account, "prefix_list", id).iter().for_each(|group| touch.vpc(&group.vpc_id));
            }
            // Who may connect to a volume follows from where its instance is.
            Instance::KIND => {
                touch.cards.extend(tx.find::<Volume>(account, "instance", id).iter().map(|volume| volume.card_id.clone()));
                touch.object(account, id);
            }
            Address::KIND
            | InternetGateway::KIND
            | NatGateway::KIND
            | NetworkAcl::KIND
            | NetworkInterface::KIND
            | RouteTable::KIND
            | SecurityGroup::KIND
            | Subnet::KIND
            | Volume::KIND
            | VpcPeeringConnection::KIND => {}
            // A kind that nothing is known of here.
            _ => touch.account(account),
        }
        for (name, value) in keys {
            match *name {
                "card" => drop(touch.cards.insert(value.clone())),
                "vpc" => touch.vpc(value),
                "instance" => touch.object(account, value),
                "interface" => {
                    if let Some(interface) = tx.get::<NetworkInterface>(account, value) {
                        touch.vpc(&interface.vpc_id);
                    }
                }
                _ => {}
            }
        }
    }
    touch.cards
}

struct Touch<'a, 'b> {
    tx: &'a Tx<'b>,
    cards: BTreeSet<String>,
    /// Those whose cards are among `cards` already.
    vpcs: BTreeSet<String>,
}

impl Touch<'_, '_> {
    /// The cards that hold, or shall hold, an object of this id.
    fn object(&mut self, account: &str, id: &str) {
        self.cards.extend(self.tx.find_all::<CardObject>("object", id).iter().map(|row| row.card_id.clone()));
        let row = self.tx.get::<Instance>(account, id);
        self.cards.extend(row.and_then(|row| row.placement.as_ref().map(|placement| placement.card_id.clone())));
    }

    /// The cards that hold a VPC.
    fn vpc(&mut self, id: &str) {
        if self.vpcs.insert(id.to_owned()) {
            self.cards.extend(self.tx.find_all::<CardObject>("object", id).iter().map(|row| row.card_id.clone()));
        }
    }

    /// Every card that has to do with an account.
    fn account(&mut self, account: &str) {
        if account == REGION {
            self.cards.extend(all(self.tx));
            return;
        }
        let vpcs: Vec<String> = self.tx.list::<Vpc>(account).map(|vpc| vpc.id.clone()).collect();
        vpcs.iter().for_each(|id| self.vpc(id));
        let placed = self.tx.list::<Instance>(account).filter_map(|row| row.placement.as_ref()).map(|placement| placement.card_id.clone());
        let stored = self.tx.list::<Volume>(account).map(|row| row.card_id.clone());
        self.cards.extend(placed.chain(stored));
    }
}
