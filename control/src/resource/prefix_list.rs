//! Managed prefix lists: blocks of addresses under one name, for rules of security groups and for routes.
//!
//! A list has versions: each change of its entries makes the next one, and the ones before can be read and restored. Whoever names the
//! list follows its newest version. A list counts in quotas with its largest size, not with what it holds, so that adding an entry
//! never breaks a quota elsewhere.
//!
//! EC2 carries changes out in the background; here they are done when the answer leaves, so a list shows no `...-in-progress`. Cards
//! are told of blocks only ([`crate::reconcile`]), and of IPv4 only: lists of IPv6 blocks are kept and shown.
//!
//! The region has no lists of its own services: there are none to be reached by routes.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use super::client_token::{self, Checked};
use super::filter::{Filters, Page};
use super::id::{PREFIX_LIST, unsupported};
use super::{route_table, security_group_rule, tag};
use crate::error::ApiError;
use crate::model::{AddressFamily, PrefixList, PrefixListEntry, PrefixListState, PrefixListVersion, RouteTable, SecurityGroup};
use crate::shapes::{
    self, AddPrefixListEntry, CreateManagedPrefixListRequest, CreateManagedPrefixListResult, DeleteManagedPrefixListRequest,
    DeleteManagedPrefixListResult, DescribeManagedPrefixListsRequest, DescribeManagedPrefixListsResult, DescribePrefixListsRequest,
    DescribePrefixListsResult, GetManagedPrefixListAssociationsRequest, GetManagedPrefixListAssociationsResult,
    GetManagedPrefixListEntriesRequest, GetManagedPrefixListEntriesResult, ManagedPrefixList, ModifyManagedPrefixListRequest,
    ModifyManagedPrefixListResult, PrefixListAssociation, RestoreManagedPrefixListVersionRequest, RestoreManagedPrefixListVersionResult,
};
use crate::world::{Call, Tx};

/// The most lists of an account.
const MOST_LISTS: usize = 100;
/// The largest size of a list.
const MOST_ENTRIES: u32 = 1000;
/// The most entries that one request adds, or removes.
const MOST_CHANGES: usize = 100;
/// How many earlier versions of a list are kept.
const KEPT_VERSIONS: u64 = 999;
/// The longest name and the longest description.
const LONGEST_TEXT: usize = 255;

/// CreateManagedPrefixList.
///
/// # Errors
/// `InvalidParameterValue` for a bad name, size, family or entry, `PrefixListMaxEntriesExceeded`, `PrefixListLimitExceeded`,
/// `IdempotentParameterMismatch`, those of tags.
pub fn create_managed_prefix_list(
    call: &mut Call<'_>,
    mut request: CreateManagedPrefixListRequest,
) -> Result<CreateManagedPrefixListResult, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateManagedPrefixList", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => {
            let list = PREFIX_LIST.row::<PrefixList>(call, &id)?;
            return Ok(CreateManagedPrefixListResult { prefix_list: Some(shape(call, &list)) });
        }
    };
    let name = checked_name(request.prefix_list_name)?;
    let family = match request.address_family.as_deref().unwrap_or_default() {
        "IPv4" => AddressFamily::Ipv4,
        "IPv6" => AddressFamily::Ipv6,
        other => return Err(ApiError::invalid_parameter("addressFamily", other)),
    };
    let max_entries = checked_size(request.max_entries)?;
    let tags = tag::specified(request.tag_specifications, &PREFIX_LIST)?;
    let mut entries = Vec::new();
    add(&mut entries, request.entries, family, max_entries)?;
    if call.list::<PrefixList>().count() >= MOST_LISTS {
        let message = "The maximum number of prefix lists has been reached.";
        return Err(ApiError::new("PrefixListLimitExceeded", message));
    }
    let account_id = call.account().to_owned();
    let list = PrefixList {
        id: call.tx.new_id(PREFIX_LIST.prefix),
        account_id,
        name,
        family,
        max_entries,
        state: PrefixListState::CreateComplete,
        state_message: None,
        version: 1,
        entries,
    };
    tag::set(&mut call.tx, &list.account_id, &PREFIX_LIST, &list.id, tags);
    fresh.remember(call, &list.id);
    let answer = shape(call, &list);
    call.tx.put(list);
    Ok(CreateManagedPrefixListResult { prefix_list: Some(answer) })
}

fn checked_name(name: Option<String>) -> Result<String, ApiError> {
    let name = name.filter(|name| !name.is_empty()).ok_or_else(|| ApiError::missing_parameter("PrefixListName"))?;
    if LONGEST_TEXT < name.chars().count() || name.starts_with("com.amazonaws") {
        return Err(ApiError::invalid_parameter("prefixListName", &name));
    }
    Ok(name)
}

fn checked_size(max_entries: Option<i32>) -> Result<u32, ApiError> {
    let size = max_entries.ok_or_else(|| ApiError::missing_parameter("MaxEntries"))?;
    u32::try_from(size)
        .ok()
        .filter(|size| (1..=MOST_ENTRIES).contains(size))
        .ok_or_else(|| ApiError::invalid_parameter("maxEntries", &size.to_string()))
}

fn read_cidr(text: Option<String>, family: AddressFamily) -> Result<IpNet, ApiError> {
    let text = text.ok_or_else(|| ApiError::missing_parameter("Cidr"))?;
    let cidr = text.parse::<IpNet>().ok().filter(|cidr| matches!(cidr, IpNet::V4(_)) == (family == AddressFamily::Ipv4));
    // EC2 stores the block that the address is in.
    cidr.map(|cidr| cidr.trunc())
        .ok_or_else(|| ApiError::invalid_value(format!("The CIDR ({text}) is invalid for a {} list.", family.name())))
}

/// Adds entries; one that is there gets the new description.
fn add(entries: &mut Vec<PrefixListEntry>, added: Vec<AddPrefixListEntry>, family: AddressFamily, most: u32) -> Result<(), ApiError> {
    check_changes(added.len())?;
    let mut seen = BTreeSet::new();
    for entry in added {
        let cidr = read_cidr(entry.cidr, family)?;
        let description = entry.description.unwrap_or_default();
        if LONGEST_TEXT < description.chars().count() {
            return Err(ApiError::invalid_value(format!("The description of the entry {cidr} has more than {LONGEST_TEXT} characters")));
        }
        if !seen.insert(cidr) {
            return Err(ApiError::invalid_value(format!("The entry {cidr} is given more than once")));
        }
        match entries.iter_mut().find(|other| other.cidr == cidr) {
            Some(other) => other.description = description,
            None => entries.push(PrefixListEntry { cidr, description }),
        }
    }
    entries.sort_by_key(|entry| entry.cidr);
    if usize::try_from(most).unwrap_or(usize::MAX) < entries.len() {
        let message = format!("You've reached the maximum number of entries for the prefix list: {most}.");
        return Err(ApiError::new("PrefixListMaxEntriesExceeded", message));
    }
    Ok(())
}

fn check_changes(count: usize) -> Result<(), ApiError> {
    if count <= MOST_CHANGES {
        return Ok(());
    }
    Err(ApiError::invalid_value(format!("A request changes at most {MOST_CHANGES} entries of a prefix list")))
}

/// ModifyManagedPrefixList: entries, size or name. A new size that somebody who names the list has no room for ends in the state
/// `modify-failed`, with the old size.
///
/// # Errors
/// `PrefixListVersionMismatch`, `PrefixListMaxEntriesExceeded`, `InvalidPrefixListModification` for an entry to remove that is not
/// there, `InvalidParameterCombination`, `MissingParameter` for entries without the current version.
pub fn modify_managed_prefix_list(
    call: &mut Call<'_>,
    request: ModifyManagedPrefixListRequest,
) -> Result<ModifyManagedPrefixListResult, ApiError> {
    unsupported(&[("IpamPrefixListResolverSyncEnabled", request.ipam_prefix_list_resolver_sync_enabled == Some(true))])?;
    let id = PREFIX_LIST.required(request.prefix_list_id, "PrefixListId")?;
    let mut list = PrefixList::clone(&*PREFIX_LIST.row::<PrefixList>(call, &id)?);
    let changes_entries = !request.add_entries.is_empty() || !request.remove_entries.is_empty();
    if !changes_entries && request.max_entries.is_none() && request.prefix_list_name.is_none() {
        return Err(ApiError::invalid_combination("No attributes specified."));
    }
    if changes_entries && request.max_entries.is_some() {
        let message = "You cannot modify the entries of a prefix list and modify the size of a prefix list at the same time";
        return Err(ApiError::invalid_combination(message));
    }
    match request.current_version {
        Some(version) => check_version(&list, version)?,
        None if changes_entries => return Err(ApiError::missing_parameter("CurrentVersion")),
        None => {}
    }
    list.state = PrefixListState::ModifyComplete;
    list.state_message = None;
    if let Some(name) = request.prefix_list_name {
        list.name = checked_name(Some(name))?;
    }
    if changes_entries {
        let mut entries = list.entries.clone();
        check_changes(request.remove_entries.len())?;
        let added: BTreeSet<&str> = request.add_entries.iter().filter_map(|entry| entry.cidr.as_deref()).collect();
        for entry in &request.remove_entries {
            if entry.cidr.as_deref().is_some_and(|cidr| added.contains(cidr)) {
                let message = "An entry cannot be added and removed in one request";
                return Err(ApiError::new("InvalidPrefixListModification", message));
            }
        }
        for entry in request.remove_entries {
            let cidr = read_cidr(entry.cidr, list.family)?;
            let place = entries.iter().position(|other| other.cidr == cidr).ok_or_else(|| {
                ApiError::new("InvalidPrefixListModification", format!("The entry {cidr} is not in the prefix list '{id}'"))
            })?;
            entries.remove(place);
        }
        add(&mut entries, request.add_entries, list.family, list.max_entries)?;
        next_version(&mut call.tx, &mut list, entries);
    }
    if let Some(size) = request.max_entries {
        resize(call, &mut list, checked_size(Some(size))?)?;
    }
    let answer = shape(call, &list);
    call.tx.put(list);
    Ok(ModifyManagedPrefixListResult { prefix_list: Some(answer) })
}

fn check_version(list: &PrefixList, version: i64) -> Result<(), ApiError> {
    if u64::try_from(version) == Ok(list.version) {
        return Ok(());
    }
    Err(ApiError::new("PrefixListVersionMismatch", "The prefix list has the incorrect version number."))
}

fn resize(call: &Call<'_>, list: &mut PrefixList, size: u32) -> Result<(), ApiError> {
    if usize::try_from(size).unwrap_or(usize::MAX) < list.entries.len() {
        let message = format!("The prefix list '{}' has more than {size} entries", list.id);
        return Err(ApiError::new("InvalidPrefixListModification", message));
    }
    let resized = PrefixList { max_entries: size, ..list.clone() };
    let groups = call.find::<SecurityGroup>("prefix_list", &list.id);
    let groups = groups.iter().filter(|group| !security_group_rule::fits(&call.tx, group, Some(&resized))).map(|group| group.id.clone());
    let tables = call.find::<RouteTable>("prefix_list", &list.id);
    let tables = tables.iter().filter(|table| !route_table::fits(&call.tx, table, Some(&resized))).map(|table| table.id.clone());
    let cannot: Vec<String> = groups.chain(tables).take(10).collect();
    if cannot.is_empty() {
        list.max_entries = size;
    } else {
        list.state = PrefixListState::ModifyFailed;
        list.state_message = Some(format!("The following resources do not support the new maximum size: {}", cannot.join(", ")));
    }
    Ok(())
}

/// RestoreManagedPrefixListVersion: the entries of an earlier version become the next one.
///
/// # Errors
/// `PrefixListVersionMismatch`, `InvalidParameterValue` for a version that never was, `PrefixListMaxEntriesExceeded` when the list has
/// become too small for it.
pub fn restore_managed_prefix_list_version(
    call: &mut Call<'_>,
    request: RestoreManagedPrefixListVersionRequest,
) -> Result<RestoreManagedPrefixListVersionResult, ApiError> {
    let id = PREFIX_LIST.required(request.prefix_list_id, "PrefixListId")?;
    let mut list = PrefixList::clone(&*PREFIX_LIST.row::<PrefixList>(call, &id)?);
    check_version(&list, request.current_version.ok_or_else(|| ApiError::missing_parameter("CurrentVersion"))?)?;
    let previous = request.previous_version.ok_or_else(|| ApiError::missing_parameter("PreviousVersion"))?;
    let entries = of_version(call, &list, previous)?;
    if usize::try_from(list.max_entries).unwrap_or(usize::MAX) < entries.len() {
        let message = format!("You've reached the maximum number of entries for the prefix list: {}.", list.max_entries);
        return Err(ApiError::new("PrefixListMaxEntriesExceeded", message));
    }
    next_version(&mut call.tx, &mut list, entries);
    list.state = PrefixListState::RestoreComplete;
    list.state_message = None;
    let answer = shape(call, &list);
    call.tx.put(list);
    Ok(RestoreManagedPrefixListVersionResult { prefix_list: Some(answer) })
}

fn of_version(call: &Call<'_>, list: &PrefixList, version: i64) -> Result<Vec<PrefixListEntry>, ApiError> {
    let number = u64::try_from(version).unwrap_or(0);
    if number == list.version {
        return Ok(list.entries.clone());
    }
    let row = call.get::<PrefixListVersion>(&PrefixListVersion::row_id(&list.id, number));
    let row = row.ok_or_else(|| ApiError::invalid_value(format!("The prefix list '{}' has no version {version}", list.id)))?;
    Ok(row.entries.clone())
}

/// Puts the present version aside and makes the next one.
fn next_version(tx: &mut Tx<'_>, list: &mut PrefixList, entries: Vec<PrefixListEntry>) {
    let entries = std::mem::replace(&mut list.entries, entries);
    let (account_id, prefix_list_id) = (list.account_id.clone(), list.id.clone());
    tx.put(PrefixListVersion { account_id, prefix_list_id, version: list.version, entries });
    list.version = list.version.saturating_add(1);
    if let Some(old) = list.version.checked_sub(KEPT_VERSIONS.saturating_add(1)) {
        tx.delete::<PrefixListVersion>(&list.account_id, &PrefixListVersion::row_id(&list.id, old));
    }
}

impl PrefixList {
    /// Its IPv4 blocks, which cards are told.
    pub fn blocks(&self) -> impl Iterator<Item = Ipv4Net> {
        self.entries.iter().filter_map(|entry| match entry.cidr {
            IpNet::V4(cidr) => Some(cidr),
            IpNet::V6(_) => None,
        })
    }
}

/// A list as it counts in a quota: the one of this id, or `changed` in its place.
pub fn counted(tx: &Tx<'_>, account: &str, id: &str, changed: Option<&PrefixList>) -> Option<Arc<PrefixList>> {
    match changed.filter(|list| list.id == id) {
        Some(list) => Some(Arc::new(list.clone())),
        None => tx.get::<PrefixList>(account, id),
    }
}

/// DeleteManagedPrefixList.
///
/// # Errors
/// `DependencyViolation` while a rule or a route names it.
pub fn delete_managed_prefix_list(
    call: &mut Call<'_>,
    request: DeleteManagedPrefixListRequest,
) -> Result<DeleteManagedPrefixListResult, ApiError> {
    let id = PREFIX_LIST.required(request.prefix_list_id, "PrefixListId")?;
    let list = PREFIX_LIST.row::<PrefixList>(call, &id)?;
    if !associations(call, &id).is_empty() {
        return Err(ApiError::dependency(format!("The prefix list '{id}' is referenced by other resources and cannot be deleted.")));
    }
    let prefix_list = ManagedPrefixList { state: Some("delete-complete".into()), ..shape(call, &list) };
    for version in call.find::<PrefixListVersion>("list", &id) {
        call.tx.delete::<PrefixListVersion>(&list.account_id, &PrefixListVersion::row_id(&id, version.version));
    }
    tag::remove(&mut call.tx, &list.account_id, &id);
    call.tx.delete::<PrefixList>(&list.account_id, &id);
    Ok(DeleteManagedPrefixListResult { prefix_list: Some(prefix_list) })
}

/// Who names a list, by id.
fn associations(call: &Call<'_>, id: &str) -> BTreeSet<String> {
    let groups = call.find::<SecurityGroup>("prefix_list", id).into_iter().map(|group| group.id.clone());
    let tables = call.find::<RouteTable>("prefix_list", id).into_iter().map(|table| table.id.clone());
    groups.chain(tables).collect()
}

/// DescribeManagedPrefixLists.
///
/// # Errors
/// `InvalidPrefixListID.NotFound` and those of filters and pages.
pub fn describe_managed_prefix_lists(
    call: &mut Call<'_>,
    request: DescribeManagedPrefixListsRequest,
) -> Result<DescribeManagedPrefixListsResult, ApiError> {
    let filters = Filters::new(request.filters, &["owner-id", "prefix-list-id", "prefix-list-name", "tag"])?;
    let page = Page::at_least_one("DescribeManagedPrefixLists", request.max_results, request.next_token.as_deref(), 100)?;
    let rows = PREFIX_LIST.rows::<PrefixList>(call, &request.prefix_list_ids)?;
    let passing = rows.into_iter().filter(|(id, list)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "owner-id" => test(&list.account_id),
            "prefix-list-id" => test(id),
            "prefix-list-name" => test(&list.name),
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeManagedPrefixListsResult { prefix_lists: page.iter().map(|list| shape(call, list)).collect(), next_token })
}

/// GetManagedPrefixListEntries, of the newest version or of the one that is named.
///
/// # Errors
/// `InvalidPrefixListID.NotFound`, `InvalidParameterValue` for a version that never was, those of pages.
pub fn get_managed_prefix_list_entries(
    call: &mut Call<'_>,
    request: GetManagedPrefixListEntriesRequest,
) -> Result<GetManagedPrefixListEntriesResult, ApiError> {
    let id = PREFIX_LIST.required(request.prefix_list_id, "PrefixListId")?;
    let list = PREFIX_LIST.row::<PrefixList>(call, &id)?;
    let page = Page::at_least_one("GetManagedPrefixListEntries", request.max_results, request.next_token.as_deref(), 100)?;
    let entries = request.target_version.map_or_else(|| Ok(list.entries.clone()), |version| of_version(call, &list, version))?;
    // Keys that sort as the entries do.
    let keyed = entries.into_iter().map(|entry| {
        let key = match entry.cidr {
            IpNet::V4(cidr) => format!("{:08x}/{:03}", u32::from(cidr.network()), cidr.prefix_len()),
            IpNet::V6(cidr) => format!("{:032x}/{:03}", u128::from(cidr.network()), cidr.prefix_len()),
        };
        (key, entry)
    });
    let (page, next_token) = page.take(keyed);
    let entry = |entry: PrefixListEntry| shapes::PrefixListEntry {
        cidr: Some(entry.cidr.to_string()),
        description: Some(entry.description).filter(|text| !text.is_empty()),
    };
    Ok(GetManagedPrefixListEntriesResult { entries: page.into_iter().map(entry).collect(), next_token })
}

/// GetManagedPrefixListAssociations.
///
/// # Errors
/// `InvalidPrefixListID.NotFound` and those of pages.
pub fn get_managed_prefix_list_associations(
    call: &mut Call<'_>,
    request: GetManagedPrefixListAssociationsRequest,
) -> Result<GetManagedPrefixListAssociationsResult, ApiError> {
    let id = PREFIX_LIST.required(request.prefix_list_id, "PrefixListId")?;
    PREFIX_LIST.row::<PrefixList>(call, &id)?;
    let page = Page::new("GetManagedPrefixListAssociations", request.max_results, request.next_token.as_deref(), 255)?;
    let (page, next_token) = page.take(associations(call, &id).into_iter().map(|id| (id.clone(), id)));
    let association = |id: String| PrefixListAssociation { resource_id: Some(id), resource_owner: Some(call.account().to_owned()) };
    Ok(GetManagedPrefixListAssociationsResult { prefix_list_associations: page.into_iter().map(association).collect(), next_token })
}

/// DescribePrefixLists: lists of the region's own services, of which there are none.
///
/// # Errors
/// `InvalidPrefixListId.NotFound` for every id, those of filters and pages.
pub fn describe_prefix_lists(_: &mut Call<'_>, request: DescribePrefixListsRequest) -> Result<DescribePrefixListsResult, ApiError> {
    Filters::new(request.filters, &["prefix-list-id", "prefix-list-name"])?;
    Page::new("DescribePrefixLists", request.max_results, request.next_token.as_deref(), 1000)?;
    PREFIX_LIST.check_all(&request.prefix_list_ids)?;
    match request.prefix_list_ids.first() {
        Some(id) => Err(ApiError::new("InvalidPrefixListId.NotFound", format!("The prefix list ID '{id}' does not exist"))),
        None => Ok(DescribePrefixListsResult::default()),
    }
}

fn shape(call: &Call<'_>, list: &PrefixList) -> ManagedPrefixList {
    ManagedPrefixList {
        prefix_list_id: Some(list.id.clone()),
        prefix_list_arn: Some(PREFIX_LIST.arn(call.region, &list.account_id, &list.id)),
        prefix_list_name: Some(list.name.clone()),
        address_family: Some(list.family.name().to_owned()),
        max_entries: i32::try_from(list.max_entries).ok(),
        owner_id: Some(list.account_id.clone()),
        state: Some(list.state.name().to_owned()),
        state_message: list.state_message.clone(),
        tags: tag::shapes(&tag::of(&call.tx, &list.account_id, &list.id)),
        version: i64::try_from(list.version).ok(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::security_group_rule::{authorize_security_group_ingress, revoke_security_group_ingress};
    use crate::shapes::{
        AuthorizeSecurityGroupIngressRequest, IpPermission, PrefixListId, RemovePrefixListEntry, RevokeSecurityGroupIngressRequest,
    };

    fn entries(cidrs: &[&str]) -> Vec<AddPrefixListEntry> {
        cidrs.iter().map(|cidr| AddPrefixListEntry { cidr: Some((*cidr).to_owned()), description: None }).collect()
    }

    fn create(family: &str, size: i32, cidrs: &[&str]) -> CreateManagedPrefixListRequest {
        CreateManagedPrefixListRequest {
            prefix_list_name: Some("offices".into()),
            address_family: Some(family.into()),
            max_entries: Some(size),
            entries: entries(cidrs),
            ..Default::default()
        }
    }

    fn made(fixture: &Fixture, size: i32, cidrs: &[&str]) -> String {
        let request = create("IPv4", size, cidrs);
        let list = fixture.call(ALICE, |call| create_managed_prefix_list(call, request)).unwrap().prefix_list.unwrap();
        assert_eq!((list.state.as_deref(), list.version), (Some("create-complete"), Some(1)));
        list.prefix_list_id.unwrap()
    }

    fn modify(id: &str, version: i64, add: &[&str], remove: &[&str]) -> ModifyManagedPrefixListRequest {
        let remove = remove.iter().map(|cidr| RemovePrefixListEntry { cidr: Some((*cidr).to_owned()) });
        ModifyManagedPrefixListRequest {
            prefix_list_id: Some(id.into()),
            current_version: Some(version),
            add_entries: entries(add),
            remove_entries: remove.collect(),
            ..Default::default()
        }
    }

    fn cidrs(fixture: &Fixture, id: &str, version: Option<i64>) -> Vec<String> {
        let request = GetManagedPrefixListEntriesRequest { prefix_list_id: Some(id.into()), target_version: version, ..Default::default() };
        let found = fixture.call(ALICE, |call| get_managed_prefix_list_entries(call, request)).unwrap().entries;
        found.into_iter().map(|entry| entry.cidr.unwrap()).collect()
    }

    fn ingress(fixture: &Fixture, list: &str) -> AuthorizeSecurityGroupIngressRequest {
        let vpc = fixture.default_vpc(ALICE).id;
        let group = crate::resource::security_group::default_group(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        let remote = PrefixListId { prefix_list_id: Some(list.into()), description: Some("offices".into()) };
        let permission = IpPermission { ip_protocol: Some("-1".into()), prefix_list_ids: vec![remote], ..Default::default() };
        AuthorizeSecurityGroupIngressRequest { group_id: Some(group), ip_permissions: vec![permission], ..Default::default() }
    }

    #[test]
    fn each_change_of_entries_is_a_version_that_can_be_read_and_restored() {
        let fixture = Fixture::new();
        let id = made(&fixture, 3, &["10.1.2.3/16", "192.0.2.0/24"]);
        assert_eq!(cidrs(&fixture, &id, None), ["10.1.0.0/16", "192.0.2.0/24"]);
        let changed = modify(&id, 1, &["198.51.100.0/24"], &["10.1.0.0/16"]);
        let list = fixture.call(ALICE, |call| modify_managed_prefix_list(call, changed.clone())).unwrap().prefix_list.unwrap();
        assert_eq!((list.state.as_deref(), list.version), (Some("modify-complete"), Some(2)));
        assert_eq!(fixture.refusal(ALICE, |call| modify_managed_prefix_list(call, changed)), "PrefixListVersionMismatch");
        assert_eq!(cidrs(&fixture, &id, Some(1)), ["10.1.0.0/16", "192.0.2.0/24"]);
        let restore = |current, previous| RestoreManagedPrefixListVersionRequest {
            prefix_list_id: Some(id.clone()),
            current_version: Some(current),
            previous_version: Some(previous),
            dry_run: None,
        };
        for (current, previous, code) in
            [(1, 1, "PrefixListVersionMismatch"), (2, 3, "InvalidParameterValue"), (2, 0, "InvalidParameterValue")]
        {
            let refused = fixture.refusal(ALICE, |call| restore_managed_prefix_list_version(call, restore(current, previous)));
            assert_eq!(refused, code, "{current} {previous}");
        }
        let list = fixture.call(ALICE, |call| restore_managed_prefix_list_version(call, restore(2, 1))).unwrap().prefix_list.unwrap();
        assert_eq!((list.state.as_deref(), list.version), (Some("restore-complete"), Some(3)));
        assert_eq!(cidrs(&fixture, &id, None), ["10.1.0.0/16", "192.0.2.0/24"]);
        assert_eq!(cidrs(&fixture, &id, Some(2)), ["192.0.2.0/24", "198.51.100.0/24"]);
    }

    #[test]
    fn a_new_name_is_no_new_version_and_a_description_can_be_replaced() {
        let fixture = Fixture::new();
        let id = made(&fixture, 2, &["10.1.0.0/16"]);
        let rename = ModifyManagedPrefixListRequest {
            prefix_list_id: Some(id.clone()),
            prefix_list_name: Some("homes".into()),
            ..Default::default()
        };
        let list = fixture.call(ALICE, |call| modify_managed_prefix_list(call, rename)).unwrap().prefix_list.unwrap();
        assert_eq!((list.prefix_list_name.as_deref(), list.version), (Some("homes"), Some(1)));
        let mut again = modify(&id, 1, &["10.1.0.0/16"], &[]);
        again.add_entries[0].description = Some("the first".into());
        fixture.call(ALICE, |call| modify_managed_prefix_list(call, again)).unwrap();
        let row = fixture.world.begin().get::<PrefixList>(ALICE, &id).unwrap();
        assert_eq!((row.entries.len(), row.entries[0].description.as_str()), (1, "the first"));
    }

    #[test]
    fn bad_lists_and_changes_are_refused_with_ec2s_codes() {
        let fixture = Fixture::new();
        let named = |name: &str| CreateManagedPrefixListRequest { prefix_list_name: Some(name.into()), ..create("IPv4", 1, &[]) };
        for (request, code) in [
            (create("IPv5", 1, &[]), "InvalidParameterValue"),
            (create("IPv4", 0, &[]), "InvalidParameterValue"),
            (create("IPv4", 1001, &[]), "InvalidParameterValue"),
            (create("IPv4", 1, &["2001:db8::/32"]), "InvalidParameterValue"),
            (create("IPv6", 1, &["10.0.0.0/8"]), "InvalidParameterValue"),
            (create("IPv4", 1, &["10.0.0.0"]), "InvalidParameterValue"),
            (create("IPv4", 2, &["10.0.0.0/8", "10.9.9.9/8"]), "InvalidParameterValue"),
            (create("IPv4", 1, &["10.0.0.0/8", "11.0.0.0/8"]), "PrefixListMaxEntriesExceeded"),
            (named("com.amazonaws.mine"), "InvalidParameterValue"),
            (named(""), "MissingParameter"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_managed_prefix_list(call, request)), code);
        }
        let id = made(&fixture, 1, &["10.0.0.0/8"]);
        let versionless = ModifyManagedPrefixListRequest { current_version: None, ..modify(&id, 1, &["11.0.0.0/8"], &[]) };
        let both = ModifyManagedPrefixListRequest { max_entries: Some(2), ..modify(&id, 1, &["11.0.0.0/8"], &[]) };
        for (request, code) in [
            (modify(&id, 1, &["11.0.0.0/8"], &[]), "PrefixListMaxEntriesExceeded"),
            (modify(&id, 1, &[], &["11.0.0.0/8"]), "InvalidPrefixListModification"),
            (modify(&id, 1, &["10.0.0.0/8"], &["10.0.0.0/8"]), "InvalidPrefixListModification"),
            (modify(&id, 1, &[], &[]), "InvalidParameterCombination"),
            (versionless, "MissingParameter"),
            (both, "InvalidParameterCombination"),
            (modify("pl-0123456789abcdef0", 1, &["11.0.0.0/8"], &[]), "InvalidPrefixListID.NotFound"),
            (modify("pl-x", 1, &["11.0.0.0/8"], &[]), "InvalidPrefixListId.Malformed"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| modify_managed_prefix_list(call, request)), code);
        }
        assert_eq!(
            fixture.refusal(BOB, |call| modify_managed_prefix_list(call, modify(&id, 1, &[], &["10.0.0.0/8"]))),
            "InvalidPrefixListID.NotFound"
        );
        let services = DescribePrefixListsRequest { prefix_list_ids: vec![id], ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| describe_prefix_lists(call, services)), "InvalidPrefixListId.NotFound");
    }

    #[test]
    fn a_list_in_use_stays_and_grows_only_as_far_as_its_users_allow() {
        let fixture = Fixture::new();
        let id = made(&fixture, 20, &["10.0.0.0/8"]);
        let request = ingress(&fixture, &id);
        let group = request.group_id.clone().unwrap();
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, request.clone())).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, request.clone())), "InvalidPermission.Duplicate");
        let list = || GetManagedPrefixListAssociationsRequest { prefix_list_id: Some(id.clone()), ..Default::default() };
        let found = fixture.call(ALICE, |call| get_managed_prefix_list_associations(call, list())).unwrap().prefix_list_associations;
        assert_eq!(found[0].resource_id.as_ref(), Some(&group));
        let delete = || DeleteManagedPrefixListRequest { prefix_list_id: Some(id.clone()), dry_run: None };
        assert_eq!(fixture.refusal(ALICE, |call| delete_managed_prefix_list(call, delete())), "DependencyViolation");
        let resize = |size| {
            let request =
                ModifyManagedPrefixListRequest { prefix_list_id: Some(id.clone()), max_entries: Some(size), ..Default::default() };
            fixture.call(ALICE, |call| modify_managed_prefix_list(call, request)).unwrap().prefix_list.unwrap()
        };
        // The group has another rule, of its own members.
        assert_eq!(resize(59).state.as_deref(), Some("modify-complete"));
        let failed = resize(60);
        assert_eq!((failed.state.as_deref(), failed.max_entries), (Some("modify-failed"), Some(59)));
        assert!(failed.state_message.unwrap().contains(&group));
        let revoke =
            RevokeSecurityGroupIngressRequest { group_id: request.group_id, ip_permissions: request.ip_permissions, ..Default::default() };
        fixture.call(ALICE, |call| revoke_security_group_ingress(call, revoke)).unwrap();
        let gone = fixture.call(ALICE, |call| delete_managed_prefix_list(call, delete())).unwrap().prefix_list.unwrap();
        assert_eq!(gone.state.as_deref(), Some("delete-complete"));
        assert_eq!(fixture.refusal(ALICE, |call| delete_managed_prefix_list(call, delete())), "InvalidPrefixListID.NotFound");
    }

    #[test]
    fn lists_of_ipv6_are_kept_and_paged() {
        let fixture = Fixture::new();
        let blocks: Vec<String> = (1..8).map(|number| format!("2001:db8:{number:x}::/48")).collect();
        let blocks: Vec<&str> = blocks.iter().map(String::as_str).collect();
        let request = create("IPv6", 7, &blocks);
        let id = fixture.call(ALICE, |call| create_managed_prefix_list(call, request)).unwrap().prefix_list.unwrap().prefix_list_id;
        let page = |next_token: Option<String>| {
            let request =
                GetManagedPrefixListEntriesRequest { prefix_list_id: id.clone(), max_results: Some(4), next_token, ..Default::default() };
            fixture.call(ALICE, |call| get_managed_prefix_list_entries(call, request)).unwrap()
        };
        let first = page(None);
        let second = page(first.next_token.clone());
        let shown: Vec<String> = first.entries.into_iter().chain(second.entries).filter_map(|entry| entry.cidr).collect();
        assert_eq!(shown, blocks);
        assert_eq!(second.next_token, None);
    }
}
