//! Routes for all blocks of a managed prefix list.
//!
//! Such a route is one route to the tenant and as many as the list's largest size to the quota. A route for a block of its own beats
//! the same block of a list; of two lists the one with the lower id counts. What is inside the VPC stays there, whatever a list holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::Ipv4Net;

use super::MOST_ROUTES;
use crate::error::ApiError;
use crate::model::{AddressFamily, PrefixList, PrefixListRoute, Route, RouteTable, RouteTarget, Vpc};
use crate::resource::id::PREFIX_LIST;
use crate::resource::{prefix_list, vpc};
use crate::world::{Call, Tx};

/// The list that a route is for.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about the id, `UnsupportedOperation` for a list of IPv6 blocks, as no route here leads to any.
pub(super) fn destination(call: &Call<'_>, id: &str) -> Result<Arc<PrefixList>, ApiError> {
    let list = PREFIX_LIST.row::<PrefixList>(call, id)?;
    if list.family == AddressFamily::Ipv6 {
        let message = format!("The prefix list '{id}' is of IPv6 blocks, which are not routed in this region");
        return Err(ApiError::new("UnsupportedOperation", message));
    }
    Ok(list)
}

/// Adds a route.
///
/// # Errors
/// `RouteAlreadyExists`, `RouteLimitExceeded`.
pub(super) fn add(call: &mut Call<'_>, table: &RouteTable, list: &PrefixList, target: RouteTarget) -> Result<(), ApiError> {
    let prefix_list_id = list.id.clone();
    if table.prefix_list_routes.iter().any(|route| route.prefix_list_id == prefix_list_id) {
        return Err(ApiError::new("RouteAlreadyExists", format!("The route identified by {prefix_list_id} already exists.")));
    }
    let mut changed = table.clone();
    changed.prefix_list_routes.push(PrefixListRoute { prefix_list_id, target });
    if !fits(&call.tx, &changed, None) {
        return Err(super::too_many(&table.id));
    }
    call.tx.put(changed);
    Ok(())
}

/// Leads a route elsewhere.
///
/// # Errors
/// `InvalidParameterValue` when there is none.
pub(super) fn replace(call: &mut Call<'_>, table: &RouteTable, id: &str, target: RouteTarget) -> Result<(), ApiError> {
    let mut changed = table.clone();
    let route = changed.prefix_list_routes.iter_mut().find(|route| route.prefix_list_id == id).ok_or_else(|| {
        let message = format!("There is no route defined for '{id}' in the route table. Use CreateRoute instead.");
        ApiError::invalid_value(message)
    })?;
    route.target = target;
    call.tx.put(changed);
    Ok(())
}

/// Takes a route away.
///
/// # Errors
/// `InvalidRoute.NotFound`.
pub(super) fn remove(call: &mut Call<'_>, table: &RouteTable, id: &str) -> Result<(), ApiError> {
    let mut changed = table.clone();
    changed.prefix_list_routes.retain(|route| route.prefix_list_id != id);
    if changed == *table {
        let message = format!("no route with destination-prefix-list-id {id} in route table {}", table.id);
        return Err(ApiError::new("InvalidRoute.NotFound", message));
    }
    call.tx.put(changed);
    Ok(())
}

/// Whether the routes of a table are within the quota, with `changed` in place of the prefix list of its id.
pub(in crate::resource) fn fits(tx: &Tx<'_>, table: &RouteTable, changed: Option<&PrefixList>) -> bool {
    let size = |route: &PrefixListRoute| {
        let list = prefix_list::counted(tx, &table.account_id, &route.prefix_list_id, changed);
        list.map_or(0, |list| usize::try_from(list.max_entries).unwrap_or(usize::MAX))
    };
    table.prefix_list_routes.iter().map(size).fold(table.routes.len(), usize::saturating_add) <= MOST_ROUTES
}

/// The routes of a table with every prefix list spread out, without the local ones.
pub(crate) fn expanded(tx: &Tx<'_>, table: &RouteTable) -> Vec<Route> {
    let local: Vec<Ipv4Net> = tx
        .get::<Vpc>(&table.account_id, &table.vpc_id)
        .iter()
        .flat_map(|vpc| vpc::cidrs(vpc).map(|(_, cidr)| cidr).collect::<Vec<_>>())
        .collect();
    let mut lists: Vec<&PrefixListRoute> = table.prefix_list_routes.iter().collect();
    lists.sort_by_key(|route| &route.prefix_list_id);
    let mut spread = BTreeMap::new();
    for route in lists {
        let Some(list) = tx.get::<PrefixList>(&table.account_id, &route.prefix_list_id) else { continue };
        for block in list.blocks().filter(|block| !local.iter().any(|local| local.contains(block))) {
            spread.entry(block).or_insert_with(|| route.target.clone());
        }
    }
    for route in &table.routes {
        spread.remove(&route.destination);
    }
    let spread = spread.into_iter().map(|(destination, target)| Route { destination, target });
    table.routes.iter().cloned().chain(spread).collect()
}
