//! Accounts: an operator makes one, and it owns at once what a new AWS account
//! owns: a default VPC with a subnet in each zone.

use super::vpc;
use crate::error::ApiError;
use crate::model::{AccessKey, Account, REGION, Time};
use crate::world::{Region, Tx};

/// A fresh account and the only sight of its secret.
#[derive(Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub struct Credentials {
    pub account_id: String,
    pub access_key_id: String,
    pub secret_access_key: String,
}

const ID_LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
const SECRET_LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Makes an account with its first access key and its default VPC.
///
/// # Errors
/// When the region has no room for another VPC.
pub fn create_account(tx: &mut Tx<'_>, region: &Region, now: Time) -> Result<Credentials, ApiError> {
    let account_id = loop {
        // 10^11..10^12: twelve digits, none of them a leading zero that a tool could drop.
        let number = u64::from_le_bytes(tx.random()) % 900_000_000_000;
        let id = number.saturating_add(100_000_000_000).to_string();
        if tx.get::<Account>(REGION, &id).is_none() {
            break id;
        }
    };
    tx.put(Account { id: account_id.clone(), created: now });
    let access_key_id = format!("AKIA{}", letters(&tx.random::<16>(), ID_LETTERS));
    let secret_access_key = letters(&tx.random::<40>(), SECRET_LETTERS);
    tx.put(AccessKey { id: access_key_id.clone(), account_id: account_id.clone(), secret: secret_access_key.clone(), created: now });
    vpc::default_vpc_insert(tx, region, &account_id, now)?;
    Ok(Credentials { account_id, access_key_id, secret_access_key })
}

/// One letter for each byte. The alphabets' lengths divide 256, so every letter is equally likely.
fn letters(bytes: &[u8], alphabet: &[u8]) -> String {
    let letter = |byte: &u8| alphabet.get(usize::from(*byte) % alphabet.len()).copied().map(char::from);
    bytes.iter().filter_map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InternetGateway, NetworkAcl, RouteTable, SecurityGroup, Subnet, Vpc};
    use crate::world::World;

    #[test]
    fn a_new_account_owns_what_a_new_aws_account_owns() {
        let world = World::in_memory(Region::for_tests(), 7);
        let (created, _) = world.transact(|tx| create_account(tx, world.region(), Time(0)));
        let created = created.unwrap();
        let account = created.account_id.as_str();
        assert!(account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit()));
        assert!(created.access_key_id.len() == 20 && created.access_key_id.starts_with("AKIA"));
        assert_eq!(created.secret_access_key.len(), 40);
        let tx = world.begin();
        let vpc = tx.list::<Vpc>(account).next().unwrap();
        assert!(vpc.is_default && vpc.cidr.to_string() == "172.31.0.0/16");
        let cidrs: std::collections::BTreeSet<_> =
            tx.list::<Subnet>(account).map(|subnet| (subnet.zone.clone(), subnet.cidr.to_string())).collect();
        let expected = [("us-east-1a", "172.31.0.0/20"), ("us-east-1b", "172.31.16.0/20"), ("us-east-1c", "172.31.32.0/20")];
        assert_eq!(cidrs.into_iter().collect::<Vec<_>>(), expected.map(|(zone, cidr)| (zone.to_owned(), cidr.to_owned())));
        assert_eq!(tx.list::<InternetGateway>(account).count(), 1);
        assert_eq!(tx.list::<RouteTable>(account).count(), 1);
        assert_eq!(tx.list::<NetworkAcl>(account).count(), 1);
        assert_eq!(tx.list::<SecurityGroup>(account).map(|group| group.name.as_str()).collect::<Vec<_>>(), ["default"]);
    }
}
