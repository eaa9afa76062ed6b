//! Filters and pages of the Describe operations.
//!
//! A row passes a list of filters when it passes each; it passes one when any of its values matches any of the filter's. In a
//! filter's value `*` stands for any run of characters, `?` for at most one, and a backslash takes the meaning from the next
//! character. Names and values are case-sensitive.
//!
//! A page ends with a token that names the last row which was sent, so that rows which come or go between two calls neither repeat
//! nor hide others. Rows are sent in the order of their ids.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use crate::error::ApiError;
use crate::shapes;

/// The most filters that one request may hold.
pub const MOST_FILTERS: usize = 50;
/// The most values that all filters of one request may hold.
pub const MOST_VALUES: usize = 200;

/// The most wildcards that one value may hold, so that no request keeps the world busy for long.
const MOST_WILDCARDS: usize = 64;

/// The filters of one request.
pub struct Filters(Vec<Filter>);

struct Filter {
    name: String,
    patterns: Vec<Pattern>,
}

impl Filters {
    /// Reads the filters of a request that knows `names`; `tag` among them allows `tag:<key>` and `tag-key`.
    ///
    /// # Errors
    /// `InvalidParameterValue` for a name that the operation does not know, `FilterLimitExceeded` for too many.
    pub fn new(filters: Vec<shapes::Filter>, names: &[&str]) -> Result<Self, ApiError> {
        let values: usize = filters.iter().map(|filter| filter.values.len()).sum();
        if filters.len() > MOST_FILTERS || values > MOST_VALUES {
            let message = format!("The request uses more than {MOST_FILTERS} filters or {MOST_VALUES} filter values");
            return Err(ApiError::new("FilterLimitExceeded", message));
        }
        let known = |name: &str| match name.strip_prefix("tag:") {
            Some(_) => names.contains(&"tag"),
            None if name == "tag-key" || name == "tag-value" => names.contains(&"tag"),
            None => name != "tag" && names.contains(&name),
        };
        let read = |filter: shapes::Filter| {
            let name = filter.name.unwrap_or_else(|| "null".into());
            if !known(&name) {
                return Err(ApiError::invalid_value(format!("The filter '{name}' is invalid")));
            }
            let patterns: Vec<Pattern> = filter.values.iter().map(|value| Pattern::new(value)).collect();
            if patterns.iter().any(|pattern| pattern.wildcards() > MOST_WILDCARDS) {
                let message = format!("A value of the filter '{name}' uses more than {MOST_WILDCARDS} wildcards");
                return Err(ApiError::new("FilterLimitExceeded", message));
            }
            Ok(Filter { patterns, name })
        };
        filters.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Whether there is no filter at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a row passes. `field` is called with the name of each filter and a test of one value; it says whether any value that
    /// the row has under this name satisfies the test. Tag filters are answered from `tags`.
    pub fn pass(&self, tags: &BTreeMap<String, String>, field: impl Fn(&str, &dyn Fn(&str) -> bool) -> bool) -> bool {
        self.0.iter().all(|filter| {
            let test = |value: &str| filter.patterns.iter().any(|pattern| pattern.matches(value));
            match filter.name.as_str() {
                "tag-key" => tags.keys().any(|key| test(key)),
                "tag-value" => tags.values().any(|value| test(value)),
                name => match name.strip_prefix("tag:") {
                    Some(key) => tags.get(key).is_some_and(|value| test(value)),
                    None => field(name, &test),
                },
            }
        })
    }
}

/// One value of a filter.
pub struct Pattern {
    tokens: Vec<Token>,
    /// Characters that a matching value has at least.
    least: usize,
    /// The value itself, when nothing in it is a wildcard.
    literal: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Character(char),
    AtMostOne,
    Any,
}

impl Pattern {
    /// Reads a value.
    pub fn new(value: &str) -> Self {
        let mut tokens = Vec::with_capacity(value.len());
        let mut characters = value.chars();
        while let Some(character) = characters.next() {
            let token = match character {
                '*' => Token::Any,
                '?' => Token::AtMostOne,
                '\\' => Token::Character(characters.next().unwrap_or('\\')),
                other => Token::Character(other),
            };
            // A star swallows the wildcards beside it.
            match token {
                Token::Any => {
                    while matches!(tokens.last(), Some(Token::Any | Token::AtMostOne)) {
                        tokens.pop();
                    }
                    tokens.push(token);
                }
                Token::AtMostOne if tokens.last() == Some(&Token::Any) => {}
                _ => tokens.push(token),
            }
        }
        let character = |token: &Token| if let Token::Character(character) = token { Some(*character) } else { None };
        let literal = tokens.iter().map(character).collect();
        Self { least: tokens.iter().filter_map(character).count(), tokens, literal }
    }

    fn wildcards(&self) -> usize {
        self.tokens.len().saturating_sub(self.least)
    }

    /// Whether `value` matches. Follows all ways through the pattern at once, so the time is the product of the two lengths at
    /// worst, whatever the wildcards.
    pub fn matches(&self, value: &str) -> bool {
        if let Some(literal) = &self.literal {
            return literal == value;
        }
        if value.len() < self.least {
            return false;
        }
        // reached[i]: the first i tokens can have taken all characters so far.
        let mut reached = vec![false; self.tokens.len().saturating_add(1)];
        if let Some(first) = reached.first_mut() {
            *first = true;
        }
        self.skip(&mut reached);
        let mut next = vec![false; reached.len()];
        for character in value.chars() {
            next.fill(false);
            let mut alive = false;
            for (index, token) in self.tokens.iter().enumerate() {
                if !reached.get(index).copied().unwrap_or(false) {
                    continue;
                }
                let target = match token {
                    Token::Any => index,
                    Token::AtMostOne => index.saturating_add(1),
                    Token::Character(wanted) if *wanted == character => index.saturating_add(1),
                    Token::Character(_) => continue,
                };
                if let Some(target) = next.get_mut(target) {
                    *target = true;
                    alive = true;
                }
            }
            if !alive {
                return false;
            }
            self.skip(&mut next);
            std::mem::swap(&mut reached, &mut next);
        }
        reached.last().copied().unwrap_or(false)
    }

    /// Adds the places that are reached by letting wildcards stand for nothing.
    fn skip(&self, reached: &mut [bool]) {
        for (index, token) in self.tokens.iter().enumerate() {
            let here = reached.get(index).copied().unwrap_or(false);
            if here
                && matches!(token, Token::Any | Token::AtMostOne)
                && let Some(after) = reached.get_mut(index.saturating_add(1))
            {
                *after = true;
            }
        }
    }
}

/// Where the page of one request begins and how long it is.
pub struct Page {
    operation: &'static str,
    most: usize,
    /// The last key of the page before.
    after: Option<String>,
}

impl Page {
    /// The page that a request asks for; `most` is the operation's largest MaxResults.
    ///
    /// # Errors
    /// `InvalidParameterValue` for a MaxResults outside 5..=`most`, `InvalidNextToken` for a token that this operation did not make.
    pub fn new(operation: &'static str, max_results: Option<i32>, next_token: Option<&str>, most: i32) -> Result<Self, ApiError> {
        Self::within(operation, max_results, next_token, 5..=most)
    }

    /// As [`Page::new`], for the operations that have pages of a single row.
    ///
    /// # Errors
    /// `InvalidParameterValue` for a MaxResults outside 1..=`most`, `InvalidNextToken`.
    pub fn at_least_one(operation: &'static str, max_results: Option<i32>, next_token: Option<&str>, most: i32) -> Result<Self, ApiError> {
        Self::within(operation, max_results, next_token, 1..=most)
    }

    fn within(
        operation: &'static str,
        max_results: Option<i32>,
        next_token: Option<&str>,
        range: RangeInclusive<i32>,
    ) -> Result<Self, ApiError> {
        if let Some(given) = max_results.filter(|given| !range.contains(given)) {
            let (least, most) = (range.start(), range.end());
            let message = format!("Value ( {given} ) for parameter maxResults is invalid. Expecting a value between {least} and {most}.");
            return Err(ApiError::invalid_value(message));
        }
        let after = match next_token {
            None | Some("") => None,
            Some(token) => Some(
                read_token(operation, token).ok_or_else(|| ApiError::new("InvalidNextToken", format!("The token '{token}' is invalid")))?,
            ),
        };
        let most = max_results.and_then(|given| usize::try_from(given).ok()).unwrap_or(usize::MAX);
        Ok(Self { operation, most, after })
    }

    /// Takes this page out of rows that come in the order of their keys, and makes the token of the next page, if there is one.
    pub fn take<T>(self, rows: impl IntoIterator<Item = (String, T)>) -> (Vec<T>, Option<String>) {
        let after = self.after;
        let mut rows = rows.into_iter().skip_while(|(key, _)| after.as_ref().is_some_and(|after| key <= after));
        let mut page = Vec::new();
        let mut last = None;
        while page.len() < self.most {
            let Some((key, row)) = rows.next() else { return (page, None) };
            page.push(row);
            last = Some(key);
        }
        let token = rows.next().and(last).map(|key| write_token(self.operation, &key));
        (page, token)
    }
}

/// The checksum keeps tokens of other operations and typing mistakes out; it guards no secret, since a key is an id of the caller's.
fn checksum(operation: &str, key: &str) -> [u8; 8] {
    let digest = Sha256::new().chain_update(operation).chain_update([0]).chain_update(key).finalize();
    digest.first_chunk::<8>().copied().unwrap_or_default()
}

fn write_token(operation: &str, key: &str) -> String {
    let mut bytes = checksum(operation, key).to_vec();
    bytes.extend_from_slice(key.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

fn read_token(operation: &str, token: &str) -> Option<String> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (sum, key) = bytes.split_first_chunk::<8>()?;
    let key = std::str::from_utf8(key).ok()?;
    (checksum(operation, key) == *sum).then(|| key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(name: &str, values: &[&str]) -> shapes::Filter {
        shapes::Filter { name: Some(name.into()), values: values.iter().map(|value| (*value).to_owned()).collect() }
    }

    #[test]
    fn wildcards_match_as_ec2_says() {
        for (pattern, value, expected) in [
            ("abc", "abc", true),
            ("abc", "ABC", false),
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*c", "ac", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbb", false),
            ("a?c", "abc", true),
            ("a?c", "ac", true),
            ("a?c", "abbc", false),
            ("??", "", true),
            ("??", "abc", false),
            ("*b*d*", "abcde", true),
            (r"\*amazon\?\\", r"*amazon?\", true),
            (r"\*", "x", false),
            ("ü?", "üü", true),
            ("a?*?b", "ab", true),
            ("a?*?b", "axxxb", true),
        ] {
            assert_eq!(Pattern::new(pattern).matches(value), expected, "{pattern:?} on {value:?}");
        }
    }

    #[test]
    fn a_hostile_pattern_takes_no_exponential_time() {
        let pattern = Pattern::new(&"*a?".repeat(300));
        let started = std::time::Instant::now();
        assert!(!pattern.matches(&"a".repeat(299)));
        assert!(pattern.matches(&"a".repeat(300)));
        assert!(started.elapsed() < std::time::Duration::from_secs(2));
    }

    #[test]
    fn unknown_names_are_refused_with_ec2s_sentence() {
        for name in ["nonsense", "tag:x", "tag-key", "tag"] {
            let error = Filters::new(vec![filter(name, &["x"])], &["vpc-id"]).err().unwrap();
            assert_eq!((error.code.as_ref(), error.message), ("InvalidParameterValue", format!("The filter '{name}' is invalid")));
        }
        let nameless = shapes::Filter { name: None, values: vec!["x".into()] };
        assert_eq!(Filters::new(vec![nameless], &["vpc-id"]).err().unwrap().message, "The filter 'null' is invalid");
    }

    #[test]
    fn more_than_200_values_are_refused() {
        let values = vec!["x"; MOST_VALUES];
        assert!(Filters::new(vec![filter("vpc-id", &values)], &["vpc-id"]).is_ok());
        let more = vec![filter("vpc-id", &values), filter("vpc-id", &["y"])];
        assert_eq!(Filters::new(more, &["vpc-id"]).err().unwrap().code, "FilterLimitExceeded");
        let wild = vec![filter("vpc-id", &["?".repeat(65).as_str()])];
        assert_eq!(Filters::new(wild, &["vpc-id"]).err().unwrap().code, "FilterLimitExceeded");
    }

    #[test]
    fn filters_are_joined_by_and_their_values_by_or() {
        let tags = BTreeMap::from([("Name".to_owned(), "web-1".to_owned())]);
        let pass =
            |filters| Filters::new(filters, &["state", "tag"]).unwrap().pass(&tags, |name, test| name == "state" && test("available"));
        assert!(pass(vec![]));
        assert!(pass(vec![filter("state", &["pending", "avail*"]), filter("tag:Name", &["web-?"])]));
        assert!(pass(vec![filter("tag-key", &["N*"])]));
        assert!(!pass(vec![filter("state", &["available"]), filter("tag:Name", &["db-?"])]));
        assert!(!pass(vec![filter("tag:Other", &["*"])]));
        assert!(!pass(vec![filter("state", &[])]));
    }

    #[test]
    fn pages_join_to_the_whole_even_when_rows_come_and_go() {
        let key = |number: u32| format!("k-{number:03}");
        let mut rows: BTreeMap<String, u32> = (0..12).map(|number| (key(number), number)).collect();
        let page = |rows: &BTreeMap<String, u32>, token: Option<&str>| {
            let rows = rows.clone();
            Page::new("DescribeThings", Some(5), token, 1000).unwrap().take(rows)
        };
        let (first, token) = page(&rows, None);
        assert_eq!(first, [0, 1, 2, 3, 4]);
        rows.remove(&key(4));
        rows.remove(&key(5));
        let (second, token) = page(&rows, token.as_deref());
        assert_eq!(second, [6, 7, 8, 9, 10]);
        let (third, token) = page(&rows, token.as_deref());
        assert_eq!((third, token), (vec![11], None));
    }

    #[test]
    fn a_page_that_ends_with_the_last_row_has_no_token() {
        let rows = (0..5).map(|number| (format!("k-{number}"), number));
        assert_eq!(Page::new("D", Some(5), None, 1000).unwrap().take(rows).1, None);
    }

    #[test]
    fn foreign_tokens_and_sizes_out_of_range_are_refused() {
        let token = write_token("DescribeVpcs", "vpc-1");
        assert_eq!(read_token("DescribeVpcs", &token).as_deref(), Some("vpc-1"));
        for token in [token.as_str(), "garbage", "AAAAAAAAAAAAAAAA"] {
            assert_eq!(Page::new("DescribeSubnets", None, Some(token), 1000).err().unwrap().code, "InvalidNextToken");
        }
        for size in [-1, 0, 4, 1001] {
            assert_eq!(Page::new("DescribeSubnets", Some(size), None, 1000).err().unwrap().code, "InvalidParameterValue");
        }
    }
}
