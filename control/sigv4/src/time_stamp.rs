//! The time of a request in the basic form of ISO 8601: `20150830T123600Z`.

use time::format_description::well_known::Rfc2822;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

/// A moment, to the second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeStamp {
    text: String,
    unix_s: i64,
}

impl TimeStamp {
    /// Reads `20150830T123600Z`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let format = format_description!("[year][month][day]T[hour][minute][second]Z");
        let moment = PrimitiveDateTime::parse(text, format).ok()?.assume_utc();
        // Signs and padding that the parser tolerates would make two texts of one moment.
        (text.len() == 16).then(|| Self { text: text.to_owned(), unix_s: moment.unix_timestamp() })
    }

    /// Reads the form of the header `Date`: `Sun, 30 Aug 2015 12:36:00 GMT`.
    #[must_use]
    pub fn parse_http(text: &str) -> Option<Self> {
        OffsetDateTime::parse(text, &Rfc2822).ok().map(|moment| Self::from_unix_s(moment.unix_timestamp()))
    }

    /// The moment `unix_s` seconds after 1970; the first moment when that is no date.
    #[must_use]
    pub fn from_unix_s(unix_s: i64) -> Self {
        let moment = OffsetDateTime::from_unix_timestamp(unix_s).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let (year, month, day) = moment.to_calendar_date();
        let (hour, minute, second) = moment.to_hms();
        let text = format!("{year:04}{:02}{day:02}T{hour:02}{minute:02}{second:02}Z", u8::from(month));
        Self { text, unix_s: moment.unix_timestamp() }
    }

    /// `20150830T123600Z`
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// `20150830`
    #[must_use]
    pub fn date(&self) -> &str {
        self.text.split('T').next().unwrap_or_default()
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn unix_s(&self) -> i64 {
        self.unix_s
    }
}
