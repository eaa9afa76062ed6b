//! What the tenant API said.

/// The XML of an accepted call.
#[derive(Debug, Clone)]
pub struct Answer(pub String);

/// A refused call: EC2's code and sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Such as `InvalidInstanceID.NotFound`.
    pub code: String,
    /// For people.
    pub message: String,
}

impl Answer {
    /// The text of the first element of that name.
    #[must_use]
    pub fn first(&self, name: &str) -> Option<String> {
        self.all(name).into_iter().next()
    }

    /// The text of the first element of that name, which has to be there.
    #[must_use]
    pub fn need(&self, name: &str) -> String {
        self.first(name).unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }

    /// The texts of all elements of that name, in order.
    #[must_use]
    pub fn all(&self, name: &str) -> Vec<String> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        self.0.split(&open).skip(1).filter_map(|rest| rest.split_once(&close).map(|(text, _)| unescape(text))).collect()
    }

    /// The inside of the first element of that name, as an answer of its own.
    #[must_use]
    pub fn within(&self, name: &str) -> Option<Answer> {
        let (_, rest) = self.0.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(text, _)| Answer(text.to_owned()))
    }
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#xA;", "\n")
        .replace("&#xD;", "\r")
        .replace("&amp;", "&")
}
