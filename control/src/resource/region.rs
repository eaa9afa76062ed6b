//! Regions, availability zones and account attributes.
//!
//! A zone's name is `us-east-1a`, its id `use1-az1`: the parts of the region's name in short, then the number of the zone.

use super::filter::Filters;
use super::tag::TagMap;
use crate::error::ApiError;
use crate::model::Vpc;
use crate::shapes::{
    self, AccountAttribute, AccountAttributeValue, AvailabilityZone, DescribeAccountAttributesRequest, DescribeAccountAttributesResult,
    DescribeAvailabilityZonesRequest, DescribeAvailabilityZonesResult, DescribeRegionsRequest, DescribeRegionsResult,
};
use crate::world::{Call, Zone};

/// The id of the zone number `index` (from 0) of a region: `us-east-1`, 0 gives `use1-az1`, `ap-southeast-2`, 1 gives `apse2-az2`.
pub fn zone_id(region: &str, index: usize) -> String {
    let short: String = region.split('-').map(short_word).collect();
    format!("{short}-az{}", index.saturating_add(1))
}

/// Compass points shrink to their letters; the first part, which is short already, and the number stay.
fn short_word(word: &str) -> &str {
    match word {
        "north" => "n",
        "south" => "s",
        "east" => "e",
        "west" => "w",
        "central" => "c",
        "northeast" => "ne",
        "northwest" => "nw",
        "southeast" => "se",
        "southwest" => "sw",
        other => other,
    }
}

/// DescribeRegions: this region alone, since an endpoint knows no other.
///
/// # Errors
/// `InvalidParameterValue` for the name of another region.
pub fn describe_regions(call: &mut Call<'_>, request: DescribeRegionsRequest) -> Result<DescribeRegionsResult, ApiError> {
    let name = &call.region.name;
    if let Some(other) = request.region_names.iter().find(|given| *given != name) {
        return Err(ApiError::invalid_value(format!("Invalid region provided: {other}")));
    }
    let filters = Filters::new(request.filters, &["endpoint", "opt-in-status", "region-name"])?;
    let endpoint = format!("ec2.{name}.amazonaws.com");
    let passes = filters.pass(&TagMap::new(), |filter, test| match filter {
        "endpoint" => test(&endpoint),
        "opt-in-status" => test("opt-in-not-required"),
        "region-name" => test(name),
        _ => false,
    });
    let region = shapes::Region {
        region_name: Some(name.clone()),
        endpoint: Some(endpoint),
        opt_in_status: Some("opt-in-not-required".into()),
        ..Default::default()
    };
    Ok(DescribeRegionsResult { regions: if passes { vec![region] } else { Vec::new() } })
}

/// DescribeAvailabilityZones.
///
/// # Errors
/// `InvalidParameterValue` for an unknown zone.
pub fn describe_availability_zones(
    call: &mut Call<'_>,
    request: DescribeAvailabilityZonesRequest,
) -> Result<DescribeAvailabilityZonesResult, ApiError> {
    let region = call.region;
    if let Some(name) = request.zone_names.iter().find(|name| region.zone(name).is_none()) {
        return Err(ApiError::invalid_value(format!("Invalid availability zone: [{name}]")));
    }
    if let Some(id) = request.zone_ids.iter().find(|id| !region.zones.iter().any(|zone| zone.id == **id)) {
        return Err(ApiError::invalid_value(format!("Invalid availability zone-id: [{id}]")));
    }
    let names = [
        "group-long-name",
        "group-name",
        "message",
        "opt-in-status",
        "parent-zone-id",
        "parent-zone-name",
        "region-name",
        "state",
        "zone-id",
        "zone-name",
        "zone-type",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let group = zone_group(&region.name);
    let passes = |zone: &&Zone| {
        let named = request.zone_names.is_empty() || request.zone_names.contains(&zone.name);
        let identified = request.zone_ids.is_empty() || request.zone_ids.contains(&zone.id);
        named
            && identified
            && filters.pass(&TagMap::new(), |filter, test| match filter {
                "group-name" => test(&group),
                "opt-in-status" => test("opt-in-not-required"),
                "region-name" => test(&region.name),
                "state" => test("available"),
                "zone-id" => test(&zone.id),
                "zone-name" => test(&zone.name),
                "zone-type" => test("availability-zone"),
                // Messages, long names and parents belong to kinds of zones that are not here.
                _ => false,
            })
    };
    let shape = |zone: &Zone| AvailabilityZone {
        state: Some("available".into()),
        opt_in_status: Some("opt-in-not-required".into()),
        region_name: Some(region.name.clone()),
        zone_name: Some(zone.name.clone()),
        zone_id: Some(zone.id.clone()),
        group_name: Some(group.clone()),
        network_border_group: Some(region.name.clone()),
        zone_type: Some("availability-zone".into()),
        ..Default::default()
    };
    Ok(DescribeAvailabilityZonesResult { availability_zones: region.zones.iter().filter(passes).map(shape).collect() })
}

fn zone_group(region: &str) -> String {
    format!("{region}-zg-1")
}

/// DescribeAccountAttributes.
///
/// # Errors
/// `InvalidParameterValue` for an unknown attribute.
pub fn describe_account_attributes(
    call: &mut Call<'_>,
    request: DescribeAccountAttributesRequest,
) -> Result<DescribeAccountAttributesResult, ApiError> {
    let default_vpc = call.list::<Vpc>().find(|vpc| vpc.is_default).map_or_else(|| "none".to_owned(), |vpc| vpc.id.clone());
    let number = |value: usize| vec![value.to_string()];
    let all = [
        ("supported-platforms", vec!["VPC".to_owned()]),
        ("vpc-max-security-groups-per-interface", number(super::network_interface::MOST_GROUPS)),
        ("max-elastic-ips", number(super::address::MOST_ADDRESSES)),
        ("vpc-max-elastic-ips", number(super::address::MOST_ADDRESSES)),
        ("default-vpc", vec![default_vpc]),
    ];
    if let Some(name) = request.attribute_names.iter().find(|name| !all.iter().any(|(known, _)| known == name)) {
        return Err(ApiError::invalid_parameter("attributeName", name));
    }
    let asked =
        |(name, _): &(&str, Vec<String>)| request.attribute_names.is_empty() || request.attribute_names.iter().any(|asked| asked == name);
    let shape = |(name, values): (&str, Vec<String>)| AccountAttribute {
        attribute_name: Some(name.to_owned()),
        attribute_values: values.into_iter().map(|value| AccountAttributeValue { attribute_value: Some(value) }).collect(),
    };
    Ok(DescribeAccountAttributesResult { account_attributes: all.into_iter().filter(asked).map(shape).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zone_ids_follow_ec2s_short_names() {
        for (region, index, expected) in [
            ("us-east-1", 0, "use1-az1"),
            ("us-west-2", 3, "usw2-az4"),
            ("ap-southeast-2", 1, "apse2-az2"),
            ("eu-central-1", 2, "euc1-az3"),
        ] {
            assert_eq!(zone_id(region, index), expected);
        }
    }
}
