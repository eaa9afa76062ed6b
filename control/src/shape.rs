//! Typed requests and answers: the macros that the generated [`crate::shapes`] consists of, and the two traits behind
//! them.
//!
//! A *request* is decoded from the flat parameters of the `ec2` Query protocol (`A.1.B=value`, lists flattened), an
//! *answer* is encoded as XML (lists as `<item>`), a *record* is both. A shape is a plain struct of `Option` and `Vec`
//! fields named in snake case.
//!
//! Decoding refuses what EC2 refuses: unknown names (`UnknownParameter`), absent required ones (`MissingParameter`), and
//! values of the wrong form, outside the words of their enumeration or outside their range (`InvalidParameterValue`).
//! It allocates for values only, and takes time in proportion to the number of parameters.
//!
//! `DryRun` is decided in one place, the dispatcher in [`crate::api`]: it lets the action run in its transaction, which is then
//! undone, and answers `DryRunOperation` where the action succeeded. Actions need not look at the member.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::error::ApiError;
use crate::xml::Xml;

/// The longest list that a request may hold.
pub const LONGEST_LIST: usize = 1_000;

/// A shape that comes in a request.
pub trait Decode: Sized {
    /// Reads the value out of the parameters below `node`.
    ///
    /// # Errors
    /// EC2's code for what is wrong, naming the parameter in full.
    fn decode(node: Node<'_>) -> Result<Self, ApiError>;
}

/// The whole input of an operation.
pub trait Request: Decode {
    /// Whether the caller only asks whether the call would succeed.
    fn dry_run(&self) -> bool;
}

/// A shape that goes out in an answer.
pub trait Encode {
    /// Appends the element `name`, or nothing where the value is absent.
    fn encode(&self, name: &'static str, xml: &mut Xml);
}

/// The whole output of an operation: its members without an element around them.
pub trait Answer {
    /// Appends the members.
    fn members(&self, xml: &mut Xml);
}

/// Operations without output of their own answer `<return>true</return>`.
impl Answer for () {
    fn members(&self, xml: &mut Xml) {
        true.encode("return", xml);
    }
}

/// A parameter of a request: its full name and its value, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter<'a> {
    /// The full name, as `BlockDeviceMapping.1.Ebs.VolumeSize`.
    pub name: &'a str,
    /// The value, percent-decoding done.
    pub value: &'a str,
}

/// A place in the tree that the dotted names form: a run of sorted parameters that share their first `depth` bytes.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    parameters: &'a [Parameter<'a>],
    /// Bytes of the names that belong to this place; the names go on with a dot, or end.
    depth: usize,
}

impl<'a> Node<'a> {
    /// The root over parameters, which are put into the order that the tree needs.
    #[must_use]
    pub fn root(parameters: &'a mut [Parameter<'a>]) -> Self {
        // A dot counts as the lowest byte, so that all names below one place stand together.
        let key = |byte: u8| if byte == b'.' { 0 } else { byte };
        parameters.sort_by(|a, b| a.name.bytes().map(key).cmp(b.name.bytes().map(key)));
        Self { parameters, depth: 0 }
    }

    /// The full name of this place.
    #[must_use]
    pub fn path(&self) -> &'a str {
        let name = self.parameters.first().map_or("", |parameter| parameter.name);
        name.get(..self.depth).unwrap_or(name)
    }

    /// The last part of the name.
    #[must_use]
    pub fn name(&self) -> &'a str {
        let path = self.path();
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// The full name that the member `name` of this place has.
    fn path_of(&self, name: &str) -> String {
        match self.path() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        }
    }

    /// The value of a place that has one and nothing below it.
    ///
    /// # Errors
    /// `UnknownParameter` for names below it, `InvalidParameterCombination` for a second value.
    pub fn value(&self) -> Result<&'a str, ApiError> {
        if let Some(below) = self.parameters.iter().find(|parameter| parameter.name.len() != self.depth) {
            return Err(ApiError::unknown_parameter(below.name));
        }
        match self.parameters {
            [parameter] => Ok(parameter.value),
            _ => {
                let name = self.path();
                Err(ApiError::invalid_combination(format!("The parameter {name} may be given only once")))
            }
        }
    }

    /// The places directly below this one, in the order of their names.
    ///
    /// # Errors
    /// `UnknownParameter` where this place has a value of its own.
    pub fn children(&self) -> Result<Children<'a>, ApiError> {
        match self.parameters.first() {
            Some(parameter) if 0 < self.depth && parameter.name.len() == self.depth => Err(self.unknown()),
            _ => Ok(Children { parameters: self.parameters, depth: self.depth }),
        }
    }

    /// The error for a place that no member is called like.
    #[must_use]
    pub fn unknown(&self) -> ApiError {
        // The first full name is what the caller wrote.
        ApiError::unknown_parameter(self.parameters.first().map_or("", |parameter| parameter.name))
    }

    /// The error for a value that is not acceptable.
    #[must_use]
    pub fn invalid(&self, value: &str) -> ApiError {
        ApiError::invalid_parameter(self.path(), value)
    }

    /// The error for a required member that is absent.
    #[must_use]
    pub fn missing(&self, name: &str) -> ApiError {
        ApiError::missing_parameter(&self.path_of(name))
    }

    /// The elements of a list: numbers below this place, in their order; gaps do not matter.
    ///
    /// # Errors
    /// `UnknownParameter` for what is no number, `InvalidParameterValue` above [`LONGEST_LIST`].
    pub fn elements(&self) -> Result<Vec<Node<'a>>, ApiError> {
        let mut elements = Vec::new();
        for child in self.children()? {
            let name = child.name();
            let digits = name.bytes().all(|byte| byte.is_ascii_digit());
            let index: u32 = name.parse().ok().filter(|_| digits).ok_or_else(|| child.unknown())?;
            if elements.len() == LONGEST_LIST {
                let message = format!("The parameter {} holds more than {LONGEST_LIST} values", self.path());
                return Err(ApiError::invalid_value(message));
            }
            elements.push((index, child));
        }
        elements.sort_by_key(|(index, _)| *index);
        Ok(elements.into_iter().map(|(_, child)| child).collect())
    }

    /// Checks that each value here is one of the sorted `words`.
    ///
    /// # Errors
    /// `InvalidParameterValue`.
    pub fn one_of(&self, words: &[&str]) -> Result<(), ApiError> {
        let wrong = self.parameters.iter().find(|parameter| words.binary_search(&parameter.value).is_err());
        wrong.map_or(Ok(()), |wrong| Err(ApiError::invalid_parameter(wrong.name, wrong.value)))
    }

    /// Checks that each number here is in `range`; what is no number is left to the decoder.
    ///
    /// # Errors
    /// `InvalidParameterValue`.
    pub fn within(&self, range: std::ops::RangeInclusive<i64>) -> Result<(), ApiError> {
        let outside = |parameter: &&Parameter<'_>| parameter.value.parse().is_ok_and(|value| !range.contains(&value));
        self.parameters.iter().find(outside).map_or(Ok(()), |wrong| {
            let (low, high) = (range.start(), range.end());
            let (name, value) = (wrong.name, wrong.value);
            let message = format!("Value ( {value} ) for parameter {name} is invalid. Expecting a value from {low} to {high}.");
            Err(ApiError::invalid_value(message))
        })
    }
}

/// See [`Node::children`].
#[derive(Debug)]
pub struct Children<'a> {
    parameters: &'a [Parameter<'a>],
    depth: usize,
}

impl<'a> Iterator for Children<'a> {
    type Item = Node<'a>;

    fn next(&mut self) -> Option<Node<'a>> {
        let first = self.parameters.first()?;
        let start = if self.depth == 0 { 0 } else { self.depth + 1 };
        let rest = first.name.get(start..).unwrap_or_default();
        let depth = start + rest.find('.').unwrap_or(rest.len());
        let path = first.name.get(..depth).unwrap_or(first.name);
        let below =
            |parameter: &&Parameter<'_>| parameter.name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let (here, after) = self.parameters.split_at(self.parameters.iter().take_while(below).count());
        self.parameters = after;
        Some(Node { parameters: here, depth })
    }
}

impl<T: Decode> Decode for Option<T> {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        T::decode(node).map(Some)
    }
}

impl<T: Decode> Decode for Vec<T> {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        node.elements()?.into_iter().map(T::decode).collect()
    }
}

impl Decode for String {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        node.value().map(str::to_owned)
    }
}

impl Decode for bool {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        match node.value()? {
            "true" | "True" | "TRUE" | "1" => Ok(true),
            "false" | "False" | "FALSE" | "0" => Ok(false),
            other => Err(node.invalid(other)),
        }
    }
}

/// Numbers are read by Rust's own parsers; of floating-point words (`inf`, `nan`) none is a number here.
macro_rules! decode_number {
    ($($number:ty),*) => {$(
        impl Decode for $number {
            fn decode(node: Node<'_>) -> Result<Self, ApiError> {
                let value = node.value()?;
                let plain = value.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'));
                value.parse().ok().filter(|_| plain).ok_or_else(|| node.invalid(value))
            }
        }
    )*};
}
decode_number!(i32, i64, f64);

/// Bytes that travel as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Decode for Blob {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        let value = node.value()?;
        BASE64.decode(value).map(Blob).map_err(|_| node.invalid(value))
    }
}

impl Encode for Blob {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        xml.element(name, &BASE64.encode(&self.0));
    }
}

/// A moment, to the millisecond.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub unix_ms: i64,
}

impl Timestamp {
    /// The moment `unix_ms` milliseconds after 1970.
    #[must_use]
    pub const fn from_unix_ms(unix_ms: i64) -> Self {
        Self { unix_ms }
    }

    /// As the Query protocol prints it: `2024-01-15T10:30:00.000Z`.
    #[must_use]
    pub fn to_text(self) -> String {
        let ms = self.unix_ms.rem_euclid(1_000);
        format!("{}.{ms:03}Z", self.to_text_seconds().trim_end_matches('Z'))
    }

    /// To the second, as the REST interface prints it: `2024-01-15T10:30:00Z`.
    #[must_use]
    pub fn to_text_seconds(self) -> String {
        let unix_s = self.unix_ms.div_euclid(1_000);
        let moment = OffsetDateTime::from_unix_timestamp(unix_s).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let ((year, month, day), (hour, minute, second)) = (moment.to_calendar_date(), moment.to_hms());
        format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
    }

    /// Reads ISO 8601.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let moment = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        i64::try_from(moment.unix_timestamp_nanos() / 1_000_000).ok().map(Self::from_unix_ms)
    }
}

impl Decode for Timestamp {
    fn decode(node: Node<'_>) -> Result<Self, ApiError> {
        let value = node.value()?;
        Self::parse(value).ok_or_else(|| node.invalid(value))
    }
}

impl Encode for Timestamp {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        xml.element(name, &self.to_text());
    }
}

impl<T: Encode> Encode for Option<T> {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        if let Some(value) = self {
            value.encode(name, xml);
        }
    }
}

impl<T: Encode> Encode for Vec<T> {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        if self.is_empty() {
            return xml.empty(name);
        }
        xml.open(name);
        for item in self {
            item.encode("item", xml);
        }
        xml.close(name);
    }
}

impl Encode for String {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        xml.element(name, self);
    }
}

impl Encode for bool {
    fn encode(&self, name: &'static str, xml: &mut Xml) {
        xml.element(name, if *self { "true" } else { "false" });
    }
}

macro_rules! encode_number {
    ($($number:ty),*) => {$(
        impl Encode for $number {
            fn encode(&self, name: &'static str, xml: &mut Xml) {
                xml.number(name, self);
            }
        }
    )*};
}
encode_number!(i32, i64, f64);

/// Whether a member of a request was not given.
pub(crate) trait Absent {
    fn is_absent(&self) -> bool;
}

impl<T> Absent for Option<T> {
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

impl<T> Absent for Vec<T> {
    fn is_absent(&self) -> bool {
        self.is_empty()
    }
}

/// Declares the struct of a shape.
macro_rules! structure {
    ($shape:ident { $($field:ident: $kind:ty;)* }) => {
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct $shape {
            $(pub $field: $kind,)*
        }
    };
}

/// Implements [`Decode`]. A member may be `required`, and its values `one_of WORDS` or `within LOW..=HIGH`.
macro_rules! decode {
    ($shape:ident { $($field:ident, $query:literal [$($rule:tt)*];)* }) => {
        impl $crate::shape::Decode for $shape {
            #[allow(unused_mut)]
            fn decode(node: $crate::shape::Node<'_>) -> Result<Self, $crate::error::ApiError> {
                let mut shape = Self::default();
                for child in node.children()? {
                    match child.name() {
                        $($query => {
                            $crate::shape::rule!(child [$($rule)*]);
                            shape.$field = $crate::shape::Decode::decode(child)?;
                        })*
                        _ => return Err(child.unknown()),
                    }
                }
                $($crate::shape::need!(node, shape.$field, $query [$($rule)*]);)*
                Ok(shape)
            }
        }
    };
}

/// Checks the values below a member before they are read.
macro_rules! rule {
    ($node:ident []) => {};
    ($node:ident [required]) => {};
    ($node:ident [required, $($rest:tt)*]) => { $crate::shape::rule!($node [$($rest)*]); };
    ($node:ident [one_of $words:ident]) => { $node.one_of($words)?; };
    ($node:ident [within $low:literal..=$high:literal]) => { $node.within($low..=$high)?; };
}

/// Refuses a request in which a required member was not given.
macro_rules! need {
    ($node:ident, $value:expr, $query:literal [required $($rest:tt)*]) => {
        if $crate::shape::Absent::is_absent(&$value) {
            return Err($node.missing($query));
        }
    };
    ($node:ident, $value:expr, $query:literal [$($rest:tt)*]) => {};
}

/// Implements [`Encode`] and [`Answer`]. A list may be `sparse`: left out when empty.
macro_rules! encode {
    ($shape:ident { $($field:ident, $xml:literal [$($sparse:ident)?];)* }) => {
        impl $crate::shape::Answer for $shape {
            #[allow(unused_variables)]
            fn members(&self, xml: &mut $crate::xml::Xml) {
                $($crate::shape::member!(self.$field, $xml, xml [$($sparse)?]);)*
            }
        }

        impl $crate::shape::Encode for $shape {
            fn encode(&self, name: &'static str, xml: &mut $crate::xml::Xml) {
                xml.open(name);
                $crate::shape::Answer::members(self, xml);
                xml.close(name);
            }
        }
    };
}

/// Writes one member of an answer.
macro_rules! member {
    ($value:expr, $name:literal, $xml:ident []) => {
        $crate::shape::Encode::encode(&$value, $name, $xml);
    };
    ($value:expr, $name:literal, $xml:ident [sparse]) => {
        if !$crate::shape::Absent::is_absent(&$value) {
            $crate::shape::Encode::encode(&$value, $name, $xml);
        }
    };
}

/// A shape that only requests hold: `field: type, "QueryName" [rules];`
macro_rules! request {
    ($shape:ident { $($field:ident: $kind:ty, $query:literal $([$($rule:tt)*])?;)* }) => {
        $crate::shape::structure! { $shape { $($field: $kind;)* } }
        $crate::shape::decode! { $shape { $($field, $query [$($($rule)*)?];)* } }
    };
}

/// A shape that only answers hold: `field: type, "xmlName" [sparse];`
macro_rules! answer {
    ($shape:ident { $($field:ident: $kind:ty, $xml:literal $([$sparse:ident])?;)* }) => {
        $crate::shape::structure! { $shape { $($field: $kind;)* } }
        $crate::shape::encode! { $shape { $($field, $xml [$($sparse)?];)* } }
    };
}

/// A shape of both: `field: type, "QueryName", "xmlName" [rules];`
macro_rules! record {
    ($shape:ident { $($field:ident: $kind:ty, $query:literal, $xml:literal $([$($rule:tt)*])?;)* }) => {
        $crate::shape::structure! { $shape { $($field: $kind;)* } }
        $crate::shape::decode! { $shape { $($field, $query [$($($rule)*)?];)* } }
        $crate::shape::encode! { $shape { $($field, $xml [];)* } }
    };
}

/// Implements [`Request`] for the input of an operation that has the member `DryRun`, or has not.
macro_rules! requests {
    ($shape:ident, dry_run) => {
        impl $crate::shape::Request for $shape {
            fn dry_run(&self) -> bool {
                self.dry_run == Some(true)
            }
        }
    };
    ($shape:ident, always) => {
        impl $crate::shape::Request for $shape {
            fn dry_run(&self) -> bool {
                false
            }
        }
    };
}

pub(crate) use {answer, decode, encode, member, need, record, request, requests, rule, structure};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::{InstanceAttribute, IpPermission, Reservation};

    #[test]
    fn a_moment_is_printed_to_the_millisecond_and_to_the_second() {
        let moment = Timestamp::from_unix_ms(1_705_314_600_007);
        assert_eq!(moment.to_text(), "2024-01-15T10:30:00.007Z");
        assert_eq!(moment.to_text_seconds(), "2024-01-15T10:30:00Z");
        assert_eq!(Timestamp::parse("2024-01-15T10:30:00.007Z"), Some(moment));
    }

    #[test]
    fn absent_values_are_left_out_and_empty_lists_are_not_unless_sparse() {
        let mut xml = Xml::default();
        IpPermission { ip_protocol: Some("tcp".to_owned()), from_port: Some(22), ..IpPermission::default() }.encode("item", &mut xml);
        Reservation::default().members(&mut xml);
        InstanceAttribute::default().members(&mut xml);
        assert_eq!(
            xml.into_string(),
            "<item><fromPort>22</fromPort><ipProtocol>tcp</ipProtocol><ipRanges/><ipv6Ranges/><prefixListIds/><groups/></item>\
             <groupSet/><instancesSet/>"
        );
    }
}
