//! Internet gateways: the way from a VPC to the public side. A VPC has at most one.

use super::filter::{Filters, Page};
use super::id::{INTERNET_GATEWAY, VPC};
use super::{address, tag};
use crate::error::ApiError;
use crate::model::{InternetGateway, NetworkInterface, Vpc};
use crate::shapes::{
    self, AttachInternetGatewayRequest, CreateInternetGatewayRequest, CreateInternetGatewayResult, DeleteInternetGatewayRequest,
    DescribeInternetGatewaysRequest, DescribeInternetGatewaysResult, DetachInternetGatewayRequest, InternetGatewayAttachment,
};
use crate::world::{Call, Tx};

/// The most gateways of an account.
const MOST_GATEWAYS: usize = 5;

/// CreateInternetGateway.
///
/// # Errors
/// `InternetGatewayLimitExceeded`, those of tags.
pub fn create_internet_gateway(
    call: &mut Call<'_>,
    request: CreateInternetGatewayRequest,
) -> Result<CreateInternetGatewayResult, ApiError> {
    let tags = tag::specified(request.tag_specifications, &INTERNET_GATEWAY)?;
    if call.list::<InternetGateway>().count() >= MOST_GATEWAYS {
        let message = "The maximum number of internet gateways has been reached.";
        return Err(ApiError::new("InternetGatewayLimitExceeded", message));
    }
    let account = call.account().to_owned();
    let id = insert(&mut call.tx, &account, None);
    tag::set(&mut call.tx, &account, &INTERNET_GATEWAY, &id, tags);
    let gateway = INTERNET_GATEWAY.row::<InternetGateway>(call, &id)?;
    Ok(CreateInternetGatewayResult { internet_gateway: Some(shape(call, &gateway)) })
}

/// Makes a gateway, attached or not, and returns its id.
pub fn insert(tx: &mut Tx<'_>, account: &str, vpc_id: Option<String>) -> String {
    let id = tx.new_id(INTERNET_GATEWAY.prefix);
    tx.put(InternetGateway { account_id: account.to_owned(), id: id.clone(), vpc_id });
    id
}

/// AttachInternetGateway.
///
/// # Errors
/// `Resource.AlreadyAssociated` when it is attached, `InvalidParameterValue` when the VPC has another.
pub fn attach_internet_gateway(call: &mut Call<'_>, request: AttachInternetGatewayRequest) -> Result<(), ApiError> {
    let id = INTERNET_GATEWAY.required(request.internet_gateway_id, "InternetGatewayId")?;
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let gateway = INTERNET_GATEWAY.row::<InternetGateway>(call, &id)?;
    VPC.row::<Vpc>(call, &vpc_id)?;
    if let Some(attached) = &gateway.vpc_id {
        let message = format!("resource {id} is already attached to network {attached}");
        return Err(ApiError::new("Resource.AlreadyAssociated", message));
    }
    if !call.find::<InternetGateway>("vpc", &vpc_id).is_empty() {
        let message = format!("Network {vpc_id} already has an internet gateway attached");
        return Err(ApiError::invalid_value(message));
    }
    call.tx.update::<InternetGateway>(&gateway.account_id, &id, |gateway| gateway.vpc_id = Some(vpc_id));
    Ok(())
}

/// DetachInternetGateway.
///
/// # Errors
/// `Gateway.NotAttached`; `DependencyViolation` while an interface of the VPC has a public address.
pub fn detach_internet_gateway(call: &mut Call<'_>, request: DetachInternetGatewayRequest) -> Result<(), ApiError> {
    let id = INTERNET_GATEWAY.required(request.internet_gateway_id, "InternetGatewayId")?;
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let gateway = INTERNET_GATEWAY.row::<InternetGateway>(call, &id)?;
    VPC.row::<Vpc>(call, &vpc_id)?;
    if gateway.vpc_id.as_ref() != Some(&vpc_id) {
        let message = format!("resource {id} is not attached to network {vpc_id}");
        return Err(ApiError::new("Gateway.NotAttached", message));
    }
    let interfaces = call.find::<NetworkInterface>("vpc", &vpc_id);
    if interfaces.iter().any(|interface| address::public_ip(&call.tx, interface).is_some()) {
        return Err(ApiError::dependency(format!(
            "Network {vpc_id} has some mapped public address(es). Please unmap those public address(es) before detaching the gateway."
        )));
    }
    call.tx.update::<InternetGateway>(&gateway.account_id, &id, |gateway| gateway.vpc_id = None);
    Ok(())
}

/// DeleteInternetGateway.
///
/// # Errors
/// `DependencyViolation` while it is attached.
pub fn delete_internet_gateway(call: &mut Call<'_>, request: DeleteInternetGatewayRequest) -> Result<(), ApiError> {
    let id = INTERNET_GATEWAY.required(request.internet_gateway_id, "InternetGatewayId")?;
    let gateway = INTERNET_GATEWAY.row::<InternetGateway>(call, &id)?;
    if gateway.vpc_id.is_some() {
        return Err(ApiError::dependency(format!("The internetGateway '{id}' has dependencies and cannot be deleted.")));
    }
    tag::remove(&mut call.tx, &gateway.account_id, &id);
    call.tx.delete::<InternetGateway>(&gateway.account_id, &id);
    Ok(())
}

/// DescribeInternetGateways.
///
/// # Errors
/// `InvalidInternetGatewayID.NotFound` and those of filters and pages.
pub fn describe_internet_gateways(
    call: &mut Call<'_>,
    request: DescribeInternetGatewaysRequest,
) -> Result<DescribeInternetGatewaysResult, ApiError> {
    let names = ["attachment.state", "attachment.vpc-id", "internet-gateway-id", "owner-id", "tag"];
    let filters = Filters::new(request.filters, &names)?;
    let page = Page::new("DescribeInternetGateways", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = INTERNET_GATEWAY.rows::<InternetGateway>(call, &request.internet_gateway_ids)?;
    let passing = rows.into_iter().filter(|(id, gateway)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "attachment.state" => gateway.vpc_id.is_some() && test("available"),
            "attachment.vpc-id" => gateway.vpc_id.as_ref().is_some_and(|vpc_id| test(vpc_id)),
            "internet-gateway-id" => test(id),
            "owner-id" => test(&gateway.account_id),
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeInternetGatewaysResult { internet_gateways: page.iter().map(|gateway| shape(call, gateway)).collect(), next_token })
}

fn shape(call: &Call<'_>, gateway: &InternetGateway) -> shapes::InternetGateway {
    let attachment = |vpc_id: &String| InternetGatewayAttachment { state: Some("available".into()), vpc_id: Some(vpc_id.clone()) };
    shapes::InternetGateway {
        internet_gateway_id: Some(gateway.id.clone()),
        owner_id: Some(gateway.account_id.clone()),
        attachments: gateway.vpc_id.iter().map(attachment).collect(),
        tags: tag::shapes(&tag::of(&call.tx, &gateway.account_id, &gateway.id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};

    fn create(fixture: &Fixture, account: &str) -> String {
        let request = CreateInternetGatewayRequest::default();
        let result = fixture.call(account, |call| create_internet_gateway(call, request)).unwrap();
        result.internet_gateway.unwrap().internet_gateway_id.unwrap()
    }

    fn new_vpc(fixture: &Fixture) -> String {
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap()
    }

    fn attach(id: &str, vpc_id: &str) -> AttachInternetGatewayRequest {
        AttachInternetGatewayRequest { internet_gateway_id: Some(id.into()), vpc_id: Some(vpc_id.into()), dry_run: None }
    }

    fn detach(id: &str, vpc_id: &str) -> DetachInternetGatewayRequest {
        DetachInternetGatewayRequest { internet_gateway_id: Some(id.into()), vpc_id: Some(vpc_id.into()), dry_run: None }
    }

    fn delete(id: &str) -> DeleteInternetGatewayRequest {
        DeleteInternetGatewayRequest { internet_gateway_id: Some(id.into()), dry_run: None }
    }

    #[test]
    fn a_gateway_and_a_vpc_are_attached_once() {
        let fixture = Fixture::new();
        let (vpc, gateway, other) = (new_vpc(&fixture), create(&fixture, ALICE), create(&fixture, ALICE));
        fixture.call(ALICE, |call| attach_internet_gateway(call, attach(&gateway, &vpc))).unwrap();
        let again = fixture.refusal(ALICE, |call| attach_internet_gateway(call, attach(&gateway, &vpc)));
        assert_eq!(again, "Resource.AlreadyAssociated");
        let second = fixture.refusal(ALICE, |call| attach_internet_gateway(call, attach(&other, &vpc)));
        assert_eq!(second, "InvalidParameterValue");
        assert_eq!(fixture.refusal(ALICE, |call| delete_internet_gateway(call, delete(&gateway))), "DependencyViolation");
        let not_attached = fixture.refusal(ALICE, |call| detach_internet_gateway(call, detach(&other, &vpc)));
        assert_eq!(not_attached, "Gateway.NotAttached");
        fixture.call(ALICE, |call| detach_internet_gateway(call, detach(&gateway, &vpc))).unwrap();
        fixture.call(ALICE, |call| delete_internet_gateway(call, delete(&gateway))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| delete_internet_gateway(call, delete(&gateway))), "InvalidInternetGatewayID.NotFound");
    }

    #[test]
    fn a_gateway_stays_while_a_public_address_needs_it() {
        let fixture = Fixture::new();
        let vpc = fixture.default_vpc(ALICE).id;
        let gateway = fixture.world.begin().find::<InternetGateway>(ALICE, "vpc", &vpc)[0].id.clone();
        let interface = fixture.instance(ALICE, "i-0123456789abcdef0");
        fixture.call(ALICE, |call| address::auto_take(&mut call.tx, call.region, ALICE, &interface.id)).unwrap();
        let refused = fixture.refusal(ALICE, |call| detach_internet_gateway(call, detach(&gateway, &vpc)));
        assert_eq!(refused, "DependencyViolation");
        fixture
            .call(ALICE, |call| {
                address::auto_free(&mut call.tx, ALICE, &interface.id);
                detach_internet_gateway(call, detach(&gateway, &vpc))
            })
            .unwrap();
    }

    #[test]
    fn foreign_gateways_and_vpcs_are_unknown() {
        let fixture = Fixture::new();
        let (vpc, foreign) = (new_vpc(&fixture), create(&fixture, BOB));
        let refused = fixture.refusal(ALICE, |call| attach_internet_gateway(call, attach(&foreign, &vpc)));
        assert_eq!(refused, "InvalidInternetGatewayID.NotFound");
        let refused = fixture.refusal(BOB, |call| attach_internet_gateway(call, attach(&foreign, &vpc)));
        assert_eq!(refused, "InvalidVpcID.NotFound");
        let request = DescribeInternetGatewaysRequest { internet_gateway_ids: vec![foreign], ..Default::default() };
        let refused = fixture.refusal(ALICE, |call| describe_internet_gateways(call, request));
        assert_eq!(refused, "InvalidInternetGatewayID.NotFound");
    }
}
