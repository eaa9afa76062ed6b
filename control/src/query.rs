//! The parameters of a request in the Query protocol: the query of the URL and the form in the body, together.
//!
//! Form encoding as the WHATWG URL standard reads it, but strict: a broken escape or a text that is no UTF-8 is refused. Names and
//! values without escapes are borrowed from the request.

use std::borrow::Cow;

use crate::error::ApiError;
use crate::shape::Parameter;

/// More parameters than any request of ours can use.
const MOST_PARAMETERS: usize = 20_000;

/// The parsed parameters.
#[derive(Debug, Default)]
pub struct Form<'a> {
    pairs: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> Form<'a> {
    /// Parses the query and the body.
    ///
    /// # Errors
    /// `MalformedQueryString`.
    pub fn parse(query: &'a str, body: &'a [u8]) -> Result<Self, ApiError> {
        let body = std::str::from_utf8(body).map_err(|_| malformed("The request body is not text"))?;
        let mut form = Self::default();
        for pair in query.split('&').chain(body.split('&')).filter(|pair| !pair.is_empty()) {
            if form.pairs.len() == MOST_PARAMETERS {
                return Err(malformed("The request has too many parameters"));
            }
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            form.pairs.push((decode(name)?, decode(value.trim_end_matches(['\r', '\n']))?));
        }
        Ok(form)
    }

    /// The value of a parameter of the protocol itself (`Action`, `Version`).
    ///
    /// # Errors
    /// `InvalidParameterCombination` when it is there twice.
    pub fn single(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let mut values = self.pairs.iter().filter(|(key, _)| key == name);
        match (values.next(), values.next()) {
            (_, Some(_)) => Err(ApiError::invalid_combination(format!("The parameter {name} may be given only once"))),
            (first, None) => Ok(first.map(|(_, value)| value.as_ref())),
        }
    }

    /// The parameters of the operation: all but those of the protocol and of the signature.
    #[must_use]
    pub fn parameters(&self) -> Vec<Parameter<'_>> {
        let ours = |name: &str| !matches!(name, "Action" | "Version") && !name.starts_with("X-Amz-");
        let pairs = self.pairs.iter().filter(|(name, _)| ours(name));
        pairs.map(|(name, value)| Parameter { name, value }).collect()
    }
}

fn malformed(message: &str) -> ApiError {
    ApiError::new("MalformedQueryString", message)
}

fn decode(text: &str) -> Result<Cow<'_, str>, ApiError> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).and_then(|digit| u8::try_from(digit).ok());
                let digits = digit().zip(digit());
                let (high, low) = digits.ok_or_else(|| malformed("The request has a broken percent-encoding"))?;
                high << 4 | low
            }
            byte => byte,
        });
    }
    String::from_utf8(out).map(Cow::Owned).map_err(|_| malformed("The request has a parameter that is not text"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shape::{Decode as _, Node};
    use crate::shapes::{DescribeInstancesRequest, DescribeVpcsRequest, RunInstancesRequest};

    fn decoded<T: crate::shape::Decode>(body: &str) -> Result<T, String> {
        let form = Form::parse("", body.as_bytes()).map_err(|error| error.to_string())?;
        let mut parameters = form.parameters();
        T::decode(Node::root(&mut parameters)).map_err(|error| error.to_string())
    }

    #[test]
    fn nested_structures_and_lists_are_decoded_in_the_order_of_their_indexes() {
        let request: RunInstancesRequest = decoded(
            "Action=RunInstances&Version=2016-11-15&ImageId=ami-1&MinCount=1&MaxCount=2&SecurityGroupId.10=sg-c&SecurityGroupId.2=sg-b\
             &SecurityGroupId.1=sg-a&BlockDeviceMapping.3.DeviceName=%2Fdev%2Fsda1&BlockDeviceMapping.3.Ebs.VolumeSize=20\
             &BlockDeviceMapping.3.Ebs.DeleteOnTermination=false&TagSpecification.1.ResourceType=instance\
             &TagSpecification.1.Tag.1.Key=Name&TagSpecification.1.Tag.1.Value=a+b%2Bc&Monitoring.Enabled=true&DryRun=true",
        )
        .unwrap();
        assert_eq!((request.min_count, request.max_count, request.dry_run), (Some(1), Some(2), Some(true)));
        assert_eq!(request.security_group_ids, ["sg-a", "sg-b", "sg-c"]);
        let mapping = &request.block_device_mappings[0];
        assert_eq!(mapping.device_name.as_deref(), Some("/dev/sda1"));
        let ebs = mapping.ebs.as_ref().unwrap();
        assert_eq!((ebs.volume_size, ebs.delete_on_termination), (Some(20), Some(false)));
        let tag = &request.tag_specifications[0].tags[0];
        assert_eq!((tag.key.as_deref(), tag.value.as_deref()), (Some("Name"), Some("a b+c")));
    }

    #[test]
    fn wrong_requests_are_refused_with_the_code_that_names_the_parameter() {
        for (body, message) in [
            ("MinCount=1&MaxCount=1&Foo=1", "UnknownParameter: The parameter Foo is not recognized"),
            ("MinCount=1&MaxCount=1&Monitoring.Foo=1", "UnknownParameter: The parameter Monitoring.Foo is not recognized"),
            ("MinCount=1&MaxCount=1&ImageId.1=a", "UnknownParameter: The parameter ImageId.1 is not recognized"),
            ("MinCount=1&MaxCount=1&SecurityGroupId=a", "UnknownParameter: The parameter SecurityGroupId is not recognized"),
            ("MinCount=1&MaxCount=1&SecurityGroupId.x=a", "UnknownParameter: The parameter SecurityGroupId.x is not recognized"),
            ("MinCount=1&MaxCount=1&Monitoring=1", "UnknownParameter: The parameter Monitoring is not recognized"),
            ("MinCount=1&MaxCount=1&Monitoring=1&Monitoring.Enabled=true", "UnknownParameter: The parameter Monitoring is not recognized"),
            ("MinCount=1", "MissingParameter: The request must contain the parameter MaxCount"),
            ("MinCount=1&MaxCount=1&Monitoring.", "UnknownParameter: The parameter Monitoring. is not recognized"),
            ("MinCount=1&MinCount=1&MaxCount=1", "InvalidParameterCombination: The parameter MinCount may be given only once"),
            ("MinCount=one&MaxCount=1", "InvalidParameterValue: Value (one) for parameter MinCount is invalid."),
            ("MinCount=1&MaxCount=99999999999", "InvalidParameterValue: Value (99999999999) for parameter MaxCount is invalid."),
            ("MinCount=1&MaxCount=1&EbsOptimized=yes", "InvalidParameterValue: Value (yes) for parameter EbsOptimized is invalid."),
            (
                "MinCount=1&MaxCount=1&TagSpecification.1.ResourceType=cat",
                "InvalidParameterValue: Value (cat) for parameter TagSpecification.1.ResourceType is invalid.",
            ),
            ("MinCount=%zz", "MalformedQueryString: The request has a broken percent-encoding"),
            ("MinCount=%ff", "MalformedQueryString: The request has a parameter that is not text"),
        ] {
            assert_eq!(decoded::<RunInstancesRequest>(body).unwrap_err(), message, "{body}");
        }
        assert_eq!(
            decoded::<DescribeVpcsRequest>("MaxResults=4").unwrap_err(),
            "InvalidParameterValue: Value ( 4 ) for parameter MaxResults is invalid. Expecting a value from 5 to 1000."
        );
    }

    #[test]
    fn a_list_is_refused_beyond_its_bound() {
        let body = |count: usize| (1..=count).map(|index| format!("InstanceId.{index}=i-1&")).collect::<String>();
        assert_eq!(decoded::<DescribeInstancesRequest>(&body(1_000)).unwrap().instance_ids.len(), 1_000);
        let error = decoded::<DescribeInstancesRequest>(&body(1_001)).unwrap_err();
        assert_eq!(error, "InvalidParameterValue: The parameter InstanceId holds more than 1000 values");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(form) = Form::parse("", &body) {
                let mut parameters = form.parameters();
                let _ = RunInstancesRequest::decode(Node::root(&mut parameters));
            }
        }

        #[test]
        fn nearly_right_forms_never_panic(
            body in "((MinCount|MaxCount|Filter|BlockDeviceMapping|Ebs|Tag|1|2|0|99999999999|x|)[.=&]){0,40}",
        ) {
            let _ = decoded::<RunInstancesRequest>(&body);
            let _ = decoded::<DescribeInstancesRequest>(&body);
        }
    }
}
