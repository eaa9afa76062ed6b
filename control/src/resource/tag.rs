//! Tags: up to 50 pairs of a key and a value on every resource.
//!
//! The tags of a resource are one row beside it ([`Tags`]), so that tagging a machine changes nothing that the machine is made of.
//! Whoever deletes a resource calls [`remove`]. Limits: keys of 1 to 127 characters that do not begin with `aws:`, values of 0 to 255.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use super::filter::{Filters, Page};
use super::id::{self, Noun};
use super::vpc_peering_connection;
use crate::error::ApiError;
use crate::model::{
    Address, DhcpOptions, Image, Instance, InternetGateway, KeyPair, NatGateway, NetworkAcl, NetworkInterface, PrefixList, RouteTable,
    SecurityGroup, Subnet, Tags, Volume, Vpc,
};
use crate::shapes::{CreateTagsRequest, DeleteTagsRequest, DescribeTagsRequest, DescribeTagsResult, Tag, TagDescription, TagSpecification};
use crate::world::{Call, Tx};

/// The most tags of one resource.
pub const MOST_TAGS: usize = 50;
/// The longest key, in characters.
pub const LONGEST_KEY: usize = 127;
/// The longest value, in characters.
pub const LONGEST_VALUE: usize = 255;
/// The most resources of one CreateTags or DeleteTags.
const MOST_RESOURCES: usize = 1000;

/// Keys and values.
pub type TagMap = BTreeMap<String, String>;

/// The tags of a resource, to read.
pub struct TagsOf(Option<Arc<Tags>>);

impl Deref for TagsOf {
    type Target = TagMap;

    fn deref(&self) -> &TagMap {
        static NONE: TagMap = TagMap::new();
        self.0.as_ref().map_or(&NONE, |row| &row.tags)
    }
}

/// The tags of the resource `id`; none for one that does not exist.
pub fn of(tx: &Tx<'_>, account: &str, id: &str) -> TagsOf {
    TagsOf(tx.get(account, id))
}

/// Tags as they stand in an answer.
pub fn shapes(tags: &TagMap) -> Vec<Tag> {
    tags.iter().map(|(key, value)| Tag { key: Some(key.clone()), value: Some(value.clone()) }).collect()
}

/// What a creating request wants tagged, by the kind of resource.
#[derive(Debug, Default)]
pub struct Specified(BTreeMap<String, TagMap>);

impl Specified {
    /// Reads `TagSpecifications` of an operation that creates resources of `kinds`.
    ///
    /// # Errors
    /// `InvalidParameterValue` for another kind, an empty specification or a bad tag, `TagLimitExceeded` for too many.
    pub fn new(specifications: Vec<TagSpecification>, kinds: &[&Noun]) -> Result<Self, ApiError> {
        let mut all = BTreeMap::<String, TagMap>::new();
        for specification in specifications {
            let Some(kind) = specification.resource_type else {
                return Err(ApiError::invalid_value("Tag specification resource type must have a value"));
            };
            if !kinds.iter().any(|noun| noun.resource_type == kind) {
                let message = format!("'{kind}' is not a valid taggable resource type for this operation.");
                return Err(ApiError::invalid_value(message));
            }
            if specification.tags.is_empty() {
                return Err(ApiError::invalid_value("Tag specification must have at least one tag"));
            }
            let tags = all.entry(kind).or_default();
            add(tags, specification.tags)?;
        }
        Ok(Self(all))
    }

    /// The tags for resources of one kind.
    pub fn tags(&self, noun: &Noun) -> TagMap {
        self.0.get(noun.resource_type).cloned().unwrap_or_default()
    }
}

/// Reads the specifications of an operation that creates one kind of resource.
///
/// # Errors
/// As [`Specified::new`].
pub fn specified(specifications: Vec<TagSpecification>, noun: &Noun) -> Result<TagMap, ApiError> {
    Specified::new(specifications, &[noun]).map(|specified| specified.tags(noun))
}

/// Checks tags and adds them to a map that holds none of their keys yet.
fn add(map: &mut TagMap, tags: Vec<Tag>) -> Result<(), ApiError> {
    for tag in tags {
        let (key, value) = checked(tag)?;
        if map.contains_key(&key) {
            return Err(ApiError::invalid_value(format!("Duplicate tag key '{key}' specified.")));
        }
        map.insert(key, value);
    }
    if map.len() > MOST_TAGS {
        return Err(too_many());
    }
    Ok(())
}

fn too_many() -> ApiError {
    ApiError::new("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.")
}

fn checked(tag: Tag) -> Result<(String, String), ApiError> {
    let key = tag.key.unwrap_or_default();
    let value = tag.value.unwrap_or_default();
    let problem = if key.is_empty() {
        "Tag key cannot be null or empty.".to_owned()
    } else if key.chars().count() > LONGEST_KEY {
        format!("Tag key exceeds the maximum length of {LONGEST_KEY} characters")
    } else if value.chars().count() > LONGEST_VALUE {
        format!("Tag value exceeds the maximum length of {LONGEST_VALUE} characters")
    } else if is_reserved(&key) {
        "Tag keys starting with 'aws:' are reserved for internal use".to_owned()
    } else if key.chars().chain(value.chars()).any(char::is_control) {
        "Tag keys and values must not contain control characters".to_owned()
    } else {
        return Ok((key, value));
    };
    Err(ApiError::invalid_value(problem))
}

fn is_reserved(key: &str) -> bool {
    key.get(..4).is_some_and(|prefix| prefix.eq_ignore_ascii_case("aws:"))
}

/// Gives a new resource its tags.
pub fn set(tx: &mut Tx<'_>, account: &str, noun: &Noun, id: &str, tags: TagMap) {
    if tags.is_empty() {
        return;
    }
    let resource_type = noun.resource_type.to_owned();
    tx.put(Tags { account_id: account.to_owned(), resource_id: id.to_owned(), resource_type, tags });
}

/// Forgets the tags of a resource that goes.
pub fn remove(tx: &mut Tx<'_>, account: &str, id: &str) {
    tx.delete::<Tags>(account, id);
}

/// CreateTags: adds tags or replaces their values.
///
/// # Errors
/// The `NotFound` code of the first resource that the account does not own; those of bad tags.
pub fn create_tags(call: &mut Call<'_>, request: CreateTagsRequest) -> Result<(), ApiError> {
    if request.tags.is_empty() {
        return Err(ApiError::missing_parameter("Tag"));
    }
    let mut tags = TagMap::new();
    add(&mut tags, request.tags)?;
    for (noun, id) in resources(call, &request.resources)? {
        let mut all = of(&call.tx, call.account(), &id).clone();
        all.extend(tags.clone());
        if all.keys().filter(|key| !is_reserved(key)).count() > MOST_TAGS {
            return Err(too_many());
        }
        let account = call.account().to_owned();
        set(&mut call.tx, &account, noun, &id, all);
    }
    Ok(())
}

/// DeleteTags: all tags, or those with the given keys and, where given, values.
///
/// # Errors
/// The `NotFound` code of the first resource that the account does not own.
pub fn delete_tags(call: &mut Call<'_>, request: DeleteTagsRequest) -> Result<(), ApiError> {
    for (noun, id) in resources(call, &request.resources)? {
        let mut all = of(&call.tx, call.account(), &id).clone();
        if request.tags.is_empty() {
            all.retain(|key, _| is_reserved(key));
        }
        for tag in &request.tags {
            let Some(key) = tag.key.as_deref().filter(|key| !key.is_empty()) else {
                return Err(ApiError::invalid_value("Tag key cannot be null or empty."));
            };
            let same = |value: &String| tag.value.as_ref().is_none_or(|given| given == value);
            if !is_reserved(key) && all.get(key).is_some_and(same) {
                all.remove(key);
            }
        }
        let account = call.account().to_owned();
        if all.is_empty() {
            remove(&mut call.tx, &account, &id);
        } else {
            set(&mut call.tx, &account, noun, &id, all);
        }
    }
    Ok(())
}

/// DescribeTags.
///
/// # Errors
/// Those of filters and pages.
pub fn describe_tags(call: &mut Call<'_>, request: DescribeTagsRequest) -> Result<DescribeTagsResult, ApiError> {
    // `tag:<key>` alone is known here, but not `tag-key` and `tag-value`: the filters for those are `key` and `value`.
    if let Some(name) = request.filters.iter().filter_map(|filter| filter.name.as_deref()).find(|name| name.starts_with("tag-")) {
        return Err(ApiError::invalid_value(format!("The filter '{name}' is invalid")));
    }
    let filters = Filters::new(request.filters, &["key", "resource-id", "resource-type", "tag", "value"])?;
    let page = Page::new("DescribeTags", request.max_results, request.next_token.as_deref(), 1000)?;
    let each = |row: &Arc<Tags>| {
        let row = row.clone();
        row.tags.clone().into_iter().map(move |pair| (row.clone(), TagMap::from([pair])))
    };
    let passing = call.list::<Tags>().flat_map(each).filter(|(row, one)| {
        filters.pass(one, |name, test| match name {
            "key" => one.keys().any(|key| test(key)),
            "value" => one.values().any(|value| test(value)),
            "resource-id" => test(&row.resource_id),
            "resource-type" => test(&row.resource_type),
            _ => false,
        })
    });
    let (tags, next_token) = page.take(passing.filter_map(|(row, one)| {
        let (key, value) = one.into_iter().next()?;
        let description = TagDescription {
            key: Some(key.clone()),
            value: Some(value),
            resource_id: Some(row.resource_id.clone()),
            resource_type: Some(row.resource_type.clone()),
        };
        Some((format!("{}/{key}", row.resource_id), description))
    }));
    Ok(DescribeTagsResult { tags, next_token })
}

/// The kinds of the resources of a request, all of which the account must own.
fn resources(call: &Call<'_>, ids: &[String]) -> Result<Vec<(&'static Noun, String)>, ApiError> {
    if ids.is_empty() {
        return Err(ApiError::missing_parameter("ResourceId"));
    }
    if ids.len() > MOST_RESOURCES {
        return Err(ApiError::invalid_value(format!("The maximum number of resources is {MOST_RESOURCES}")));
    }
    let kind = |id: &String| {
        let noun = id::kind_of(id).ok_or_else(|| ApiError::new("InvalidID", format!("The ID '{id}' is not valid")))?;
        if exists(call, noun, id) { Ok((noun, id.clone())) } else { Err(noun.not_found(id)) }
    };
    ids.iter().map(kind).collect()
}

fn exists(call: &Call<'_>, noun: &Noun, id: &str) -> bool {
    match noun.resource_type {
        "vpc" => call.get::<Vpc>(id).is_some(),
        "subnet" => call.get::<Subnet>(id).is_some(),
        "dhcp-options" => call.get::<DhcpOptions>(id).is_some(),
        "internet-gateway" => call.get::<InternetGateway>(id).is_some(),
        "route-table" => call.get::<RouteTable>(id).is_some(),
        "network-acl" => call.get::<NetworkAcl>(id).is_some(),
        "security-group" => call.get::<SecurityGroup>(id).is_some(),
        "security-group-rule" => call.list::<SecurityGroup>().any(|group| group.rules.iter().any(|rule| rule.id == id)),
        "network-interface" => call.get::<NetworkInterface>(id).is_some(),
        "elastic-ip" => call.get::<Address>(id).is_some(),
        "key-pair" => call.get::<KeyPair>(id).is_some(),
        "instance" => call.get::<Instance>(id).is_some(),
        "volume" => call.get::<Volume>(id).is_some(),
        "prefix-list" => call.get::<PrefixList>(id).is_some(),
        // An image that is public may be tagged by everybody; each account sees its own tags.
        "image" => call.tx.all::<Image>().any(|image| image.id == id && (image.public || image.account_id == call.account())),
        "natgateway" => call.get::<NatGateway>(id).is_some(),
        // Each side of a connection has tags of its own.
        "vpc-peering-connection" => vpc_peering_connection::row(call, id).is_ok(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::Filter;

    fn tag(key: &str, value: &str) -> Tag {
        Tag { key: Some(key.into()), value: Some(value.into()) }
    }

    fn create(fixture: &Fixture, id: &str, tags: Vec<Tag>) -> Result<(), ApiError> {
        let request = CreateTagsRequest { resources: vec![id.into()], tags, dry_run: None };
        fixture.call(ALICE, |call| create_tags(call, request))
    }

    fn tags(fixture: &Fixture, id: &str) -> Vec<(String, String)> {
        of(&fixture.world.begin(), ALICE, id).clone().into_iter().collect()
    }

    #[test]
    fn every_kind_of_resource_can_be_tagged() {
        let fixture = Fixture::new();
        fixture.instance(ALICE, "i-0123456789abcdef0");
        let mut ids = vec!["i-0123456789abcdef0".to_owned()];
        {
            let tx = fixture.world.begin();
            ids.extend(tx.list::<Vpc>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<Subnet>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<DhcpOptions>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<InternetGateway>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<RouteTable>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<NetworkAcl>(ALICE).map(|row| row.id.clone()));
            ids.extend(tx.list::<SecurityGroup>(ALICE).flat_map(|row| [row.id.clone(), row.rules[0].id.clone()]));
            ids.extend(tx.list::<NetworkInterface>(ALICE).map(|row| row.id.clone()));
        }
        let request = CreateTagsRequest { resources: ids.clone(), tags: vec![tag("Name", "x")], dry_run: None };
        fixture.call(ALICE, |call| create_tags(call, request)).unwrap();
        let all = fixture.call(ALICE, |call| describe_tags(call, Default::default())).unwrap().tags;
        assert_eq!(all.len(), ids.len());
        let kinds: std::collections::BTreeSet<_> = all.into_iter().filter_map(|tag| tag.resource_type).collect();
        assert_eq!(kinds.len(), 10);
    }

    #[test]
    fn foreign_and_unknown_resources_carry_the_code_of_their_noun() {
        let fixture = Fixture::new();
        for (id, code) in [
            (fixture.default_vpc(BOB).id.as_str(), "InvalidVpcID.NotFound"),
            ("vpc-0123456789abcdef0", "InvalidVpcID.NotFound"),
            ("i-0123456789abcdef0", "InvalidInstanceID.NotFound"),
            ("sg-0123456789abcdef0", "InvalidGroup.NotFound"),
            ("vol-0123456789abcdef0", "InvalidVolume.NotFound"),
            ("nonsense", "InvalidID"),
        ] {
            assert_eq!(create(&fixture, id, vec![tag("a", "b")]).unwrap_err().code, code);
        }
    }

    #[test]
    fn the_limits_are_50_tags_127_and_255_characters() {
        let fixture = Fixture::new();
        let id = fixture.default_vpc(ALICE).id;
        create(&fixture, &id, vec![tag(&"k".repeat(127), &"v".repeat(255))]).unwrap();
        create(&fixture, &id, vec![tag(&"ä".repeat(127), &"ä".repeat(255))]).unwrap();
        for bad in
            [tag(&"k".repeat(128), ""), tag("k", &"v".repeat(256)), tag("", "v"), tag("aws:x", "v"), tag("AWS:x", "v"), tag("a\n", "")]
        {
            assert_eq!(create(&fixture, &id, vec![bad]).unwrap_err().code, "InvalidParameterValue");
        }
        assert_eq!(create(&fixture, &id, vec![tag("a", "1"), tag("a", "2")]).unwrap_err().code, "InvalidParameterValue");
        let many = |count: usize| (0..count).map(|number| tag(&format!("k{number}"), "")).collect::<Vec<_>>();
        assert_eq!(create(&fixture, &id, many(49)).unwrap_err().code, "TagLimitExceeded");
        create(&fixture, &id, many(48)).unwrap();
        create(&fixture, &id, vec![tag("k0", "changed")]).unwrap();
        assert_eq!(create(&fixture, &id, vec![tag("one more", "")]).unwrap_err().code, "TagLimitExceeded");
    }

    #[test]
    fn tags_are_deleted_by_key_by_value_or_all() {
        let fixture = Fixture::new();
        let id = fixture.default_vpc(ALICE).id;
        create(&fixture, &id, vec![tag("a", "1"), tag("b", "2"), tag("c", "")]).unwrap();
        let delete = |tags: Vec<Tag>| {
            let request = DeleteTagsRequest { resources: vec![id.clone()], tags, dry_run: None };
            fixture.call(ALICE, |call| delete_tags(call, request)).unwrap();
            tags_left(&fixture, &id)
        };
        fn tags_left(fixture: &Fixture, id: &str) -> String {
            tags(fixture, id).into_iter().map(|(key, _)| key).collect()
        }
        assert_eq!(delete(vec![tag("a", "other")]), "abc");
        assert_eq!(delete(vec![tag("a", "1"), tag("none", "")]), "bc");
        assert_eq!(delete(vec![Tag { key: Some("b".into()), value: None }]), "c");
        assert_eq!(delete(vec![]), "");
        assert!(fixture.world.begin().get::<Tags>(ALICE, &id).is_none());
    }

    #[test]
    fn specifications_name_the_kinds_that_an_operation_makes() {
        let one = |kind: Option<&str>, tags: Vec<Tag>| TagSpecification { resource_type: kind.map(str::to_owned), tags };
        let tags = specified(vec![one(Some("vpc"), vec![tag("a", "1")])], &id::VPC).unwrap();
        assert_eq!(tags.len(), 1);
        for bad in [one(Some("subnet"), vec![tag("a", "1")]), one(Some("vpc"), vec![]), one(None, vec![tag("a", "1")])] {
            assert_eq!(specified(vec![bad], &id::VPC).unwrap_err().code, "InvalidParameterValue");
        }
        let both = vec![one(Some("instance"), vec![tag("a", "1")]), one(Some("volume"), vec![tag("b", "2")])];
        let both = Specified::new(both, &[&id::INSTANCE, &id::VOLUME]).unwrap();
        assert_eq!((both.tags(&id::INSTANCE).len(), both.tags(&id::VOLUME).len(), both.tags(&id::VPC).len()), (1, 1, 0));
    }

    #[test]
    fn describes_filter_and_page() {
        let fixture = Fixture::new();
        let (vpc, subnet) = (fixture.default_vpc(ALICE).id, fixture.default_subnet(ALICE).id);
        create(&fixture, &vpc, (0..6).map(|number| tag(&format!("k{number}"), "v")).collect()).unwrap();
        create(&fixture, &subnet, vec![tag("k0", "w")]).unwrap();
        let found = |name: &str, value: &str| {
            let filters = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
            let request = DescribeTagsRequest { filters, ..Default::default() };
            fixture.call(ALICE, |call| describe_tags(call, request)).unwrap().tags.len()
        };
        assert_eq!(found("key", "k0"), 2);
        assert_eq!(found("resource-type", "subnet"), 1);
        assert_eq!(found("resource-id", &vpc), 6);
        assert_eq!(found("value", "w"), 1);
        assert_eq!(found("tag:k0", "v"), 1);
        let page = |token: Option<String>| {
            let request = DescribeTagsRequest { max_results: Some(5), next_token: token, ..Default::default() };
            fixture.call(ALICE, |call| describe_tags(call, request)).unwrap()
        };
        let first = page(None);
        let second = page(first.next_token.clone());
        assert_eq!((first.tags.len(), second.tags.len(), second.next_token), (5, 2, None));
        assert!(fixture.call(BOB, |call| describe_tags(call, Default::default())).unwrap().tags.is_empty());
    }
}
