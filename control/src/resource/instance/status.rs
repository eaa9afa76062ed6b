//! DescribeInstanceStatus: the system check asks whether the card answers, the
//! instance check what the card says about the machine.

use super::state_shape;
use crate::error::ApiError;
use crate::model::{Card, Instance, InstanceState, REGION, Time};
use crate::resource::filter::{Filters, Page};
use crate::resource::id::INSTANCE;
use crate::resource::tag::TagMap;
use crate::shapes::{
    DescribeInstanceStatusRequest, DescribeInstanceStatusResult, InstanceStatus, InstanceStatusDetails, InstanceStatusSummary,
};
use crate::world::{Call, Tx};

/// DescribeInstanceStatus. Without `IncludeAllInstances` only running instances have one.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about an id; those of filters and pages.
pub fn describe_instance_status(
    call: &mut Call<'_>,
    request: DescribeInstanceStatusRequest,
) -> Result<DescribeInstanceStatusResult, ApiError> {
    if request.max_results.is_some() && !request.instance_ids.is_empty() {
        return Err(ApiError::invalid_combination("The parameter instancesSet cannot be used with the parameter maxResults"));
    }
    let filters = Filters::new(request.filters, FILTERS)?;
    let page = Page::new("DescribeInstanceStatus", request.max_results, request.next_token.as_deref(), 1000)?;
    let all = request.include_all_instances == Some(true);
    let rows = INSTANCE
        .rows::<Instance>(call, &request.instance_ids)?
        .into_iter()
        .filter(|(_, instance)| all || instance.state == InstanceState::Running);
    let rows = rows.map(|(id, instance)| (id, Checks::of(&call.tx, &instance), instance));
    let passing = rows.filter(|(_, checks, instance)| passes(call, &filters, checks, instance));
    let (instance_statuses, next_token) = page.take(passing.map(|(id, checks, instance)| (id, shape(call, checks, &instance))));
    Ok(DescribeInstanceStatusResult { instance_statuses, next_token })
}

/// Status and reachability of both checks.
struct Checks {
    system: (&'static str, &'static str),
    instance: (&'static str, &'static str),
    impaired_since: Option<Time>,
}

impl Checks {
    fn of(tx: &Tx<'_>, instance: &Instance) -> Self {
        let not_applicable = ("not-applicable", "");
        let card = instance.placement.as_ref().and_then(|placement| tx.get::<Card>(REGION, &placement.card_id));
        match (instance.state, card) {
            (InstanceState::Running, Some(card)) if card.watched && card.host_connected => {
                Self { system: ("ok", "passed"), instance: ("ok", "passed"), impaired_since: None }
            }
            (InstanceState::Running, card) => Self {
                system: ("impaired", "failed"),
                instance: ("insufficient-data", "insufficient-data"),
                impaired_since: card.map(|card| card.watched_since),
            },
            (InstanceState::Pending, _) => {
                Self { system: ("initializing", "initializing"), instance: ("initializing", "initializing"), impaired_since: None }
            }
            _ => Self { system: not_applicable, instance: not_applicable, impaired_since: None },
        }
    }
}

const FILTERS: &[&str] = &[
    "availability-zone",
    "availability-zone-id",
    "instance-state-code",
    "instance-state-name",
    "instance-status.reachability",
    "instance-status.status",
    "system-status.reachability",
    "system-status.status",
];

fn passes(call: &Call<'_>, filters: &Filters, checks: &Checks, instance: &Instance) -> bool {
    filters.pass(&TagMap::new(), |name, test| match name {
        "availability-zone" => test(&instance.zone),
        "availability-zone-id" => call.region.zone(&instance.zone).is_some_and(|zone| test(&zone.id)),
        "instance-state-code" => test(&instance.state.code().to_string()),
        "instance-state-name" => test(instance.state.name()),
        "instance-status.reachability" => test(checks.instance.1),
        "instance-status.status" => test(checks.instance.0),
        "system-status.reachability" => test(checks.system.1),
        "system-status.status" => test(checks.system.0),
        _ => false,
    })
}

fn shape(call: &Call<'_>, checks: Checks, instance: &Instance) -> InstanceStatus {
    let summary = |(status, reachability): (&str, &str), impaired_since: Option<Time>| InstanceStatusSummary {
        details: (!reachability.is_empty())
            .then(|| InstanceStatusDetails {
                impaired_since: impaired_since.map(Into::into),
                name: Some("reachability".to_owned()),
                status: Some(reachability.to_owned()),
            })
            .into_iter()
            .collect(),
        status: Some(status.to_owned()),
    };
    InstanceStatus {
        availability_zone: Some(instance.zone.clone()),
        availability_zone_id: call.region.zone(&instance.zone).map(|zone| zone.id.clone()),
        instance_id: Some(instance.id.clone()),
        instance_state: Some(state_shape(instance.state)),
        instance_status: Some(summary(checks.instance, None)),
        system_status: Some(summary(checks.system, checks.impaired_since)),
        ..Default::default()
    }
}
