//! The strict JSON reader: one pass, strings borrowed from the body where they can be, depth and number of values
//! bounded, duplicated names and NUL noticed.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::errors::{Errors, Pointer, ROOT};

/// A JSON value. No `Debug`: it may hold a password.
pub(super) enum Node<'a> {
    Null,
    Bool(bool),
    Number(Number),
    String(Cow<'a, str>),
    Array(Vec<Node<'a>>),
    Object(Entries<'a>),
    /// Something nested deeper than allowed, skipped.
    TooDeep,
}

/// The members of an object in their order, duplicates included.
pub(super) type Entries<'a> = Vec<(Cow<'a, str>, Node<'a>)>;

impl Node<'_> {
    /// What it is, for error messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "a list",
            Self::Object(_) => "an object",
            Self::TooDeep => "something nested too deeply",
        }
    }

    /// The same as a free-standing value.
    pub(super) fn into_value(self) -> Value {
        match self {
            Self::Null | Self::TooDeep => Value::Null,
            Self::Bool(value) => Value::Bool(value),
            Self::Number(value) => Value::Number(value),
            Self::String(value) => Value::String(value.into_owned()),
            Self::Array(items) => Value::Array(items.into_iter().map(Node::into_value).collect()),
            Self::Object(entries) => Value::Object(
                entries
                    .into_iter()
                    .map(|(name, node)| (name.into_owned(), node.into_value()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }
}

/// What reading is bounded by.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Nesting of objects and lists; the document itself is 1.
    pub(super) depth: usize,
    /// Values altogether: a two-byte `[]` costs us dozens of bytes.
    pub(super) values: usize,
}

/// A document that was read, at least in part.
pub(super) struct Document<'a> {
    /// What was read.
    pub(super) text: &'a str,
    /// The value; after a syntax error the members of the outermost object read until then.
    pub(super) root: Node<'a>,
    /// Where the syntax is broken, with line and column; never any of the text.
    pub(super) syntax: Option<String>,
    /// What is wrong with its form.
    pub(super) flaws: Flaws,
    bounds: Bounds,
}

/// Flaws of form, noticed while reading; [`Document::report`] finds their places.
#[derive(Clone, Copy, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four independent findings, not states"
)]
pub(super) struct Flaws {
    /// Nested deeper than allowed somewhere.
    pub(super) too_deep: bool,
    /// More values than allowed; what came after is missing.
    pub(super) too_many: bool,
    /// A name occurs twice in an object somewhere.
    pub(super) duplicate: bool,
    /// A string or name holds NUL, which Postgres cannot store.
    pub(super) nul: bool,
}

/// Reads a document.
pub(super) fn parse(text: &str, bounds: Bounds) -> Document<'_> {
    let mut tally = Tally {
        bounds,
        values: 0,
        flaws: Flaws::default(),
        top: None,
    };
    let mut reader = serde_json::Deserializer::from_str(text);
    let seed = Seed {
        tally: &mut tally,
        depth: 0,
    };
    let result = seed
        .deserialize(&mut reader)
        .and_then(|root| reader.end().map(|()| root));
    let (root, syntax) = match result {
        Ok(root) => (root, None),
        Err(error) => (Node::Null, Some(error.to_string())),
    };
    Document {
        text,
        root: tally.top.map_or(root, Node::Object),
        syntax,
        flaws: tally.flaws,
        bounds,
    }
}

impl Document<'_> {
    /// Names every flaw of form noticed while reading.
    pub(super) fn report(&self, errors: &mut Errors) {
        let flaws = self.flaws;
        if flaws.too_many {
            errors.push(&ROOT, format!("holds more than {} values", self.bounds.values));
        }
        if flaws.too_deep || flaws.duplicate || flaws.nul {
            describe(&self.root, &ROOT, self.bounds.depth, errors);
        }
    }
}

fn describe(node: &Node<'_>, at: &Pointer<'_>, depth: usize, errors: &mut Errors) {
    match node {
        Node::TooDeep => errors.push(at, format!("is nested too deeply; at most {depth} levels")),
        Node::String(text) if text.contains('\0') => errors.push(at, "must not contain NUL"),
        Node::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                describe(item, &at.index(index), depth, errors);
            }
        }
        Node::Object(entries) => {
            let mut seen = HashSet::with_capacity(entries.len());
            for (name, value) in entries {
                let at = at.key(name);
                if name.contains('\0') {
                    errors.push(&at, "has a name with NUL in it");
                }
                if !seen.insert(name) {
                    errors.push(&at, "occurs more than once in this object");
                }
                describe(value, &at, depth, errors);
            }
        }
        _ => {}
    }
}

struct Tally<'a> {
    bounds: Bounds,
    values: usize,
    flaws: Flaws,
    /// Members of the outermost object, kept here so that they survive a syntax error further on.
    top: Option<Entries<'a>>,
}

impl Tally<'_> {
    fn is_full(&mut self) -> bool {
        self.flaws.too_many |= self.values >= self.bounds.values;
        self.flaws.too_many
    }

    fn note(&mut self, text: &str) {
        self.flaws.nul |= text.as_bytes().contains(&0);
    }
}

struct Seed<'t, 'a> {
    tally: &'t mut Tally<'a>,
    depth: usize,
}

impl<'a> Seed<'_, 'a> {
    fn inner(&mut self) -> Seed<'_, 'a> {
        Seed {
            tally: self.tally,
            depth: self.depth + 1,
        }
    }

    fn string(self, text: Cow<'a, str>) -> Node<'a> {
        self.tally.note(&text);
        Node::String(text)
    }

    fn entries<A: MapAccess<'a>>(&mut self, map: &mut A, into: &mut Entries<'a>) -> Result<(), A::Error> {
        while let Some(Name(name)) = map.next_key()? {
            if self.tally.is_full() {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            self.tally.note(&name);
            let value = map.next_value_seed(self.inner())?;
            into.push((name, value));
        }
        self.tally.flaws.duplicate |= has_duplicate(into);
        Ok(())
    }
}

fn has_duplicate(entries: &Entries<'_>) -> bool {
    if entries.len() <= 32 {
        return entries
            .iter()
            .enumerate()
            .any(|(index, (name, _))| entries[..index].iter().any(|(earlier, _)| earlier == name));
    }
    let mut seen = HashSet::with_capacity(entries.len());
    !entries.iter().all(|(name, _)| seen.insert(&**name))
}

impl<'a> DeserializeSeed<'a> for Seed<'_, 'a> {
    type Value = Node<'a>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Node<'a>, D::Error> {
        self.tally.values += 1;
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for Seed<'_, 'a> {
    type Value = Node<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Node<'a>, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node<'a>, E> {
        Ok(Node::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node<'a>, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node<'a>, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node<'a>, E> {
        // The parser refuses numbers out of range, so it is finite.
        Ok(Number::from_f64(value).map_or(Node::Null, Node::Number))
    }

    fn visit_borrowed_str<E>(self, value: &'a str) -> Result<Node<'a>, E> {
        Ok(self.string(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node<'a>, E> {
        Ok(self.string(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'a>>(mut self, mut seq: A) -> Result<Node<'a>, A::Error> {
        let too_deep = self.depth >= self.tally.bounds.depth;
        self.tally.flaws.too_deep |= too_deep;
        let mut items = Vec::new();
        loop {
            if too_deep || self.tally.is_full() {
                if seq.next_element::<IgnoredAny>()?.is_none() {
                    break;
                }
            } else if let Some(item) = seq.next_element_seed(self.inner())? {
                items.push(item);
            } else {
                break;
            }
        }
        Ok(if too_deep {
            Node::TooDeep
        } else {
            Node::Array(items)
        })
    }

    fn visit_map<A: MapAccess<'a>>(mut self, mut map: A) -> Result<Node<'a>, A::Error> {
        if self.depth >= self.tally.bounds.depth {
            self.tally.flaws.too_deep = true;
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Node::TooDeep);
        }
        let mut entries = Vec::with_capacity(if self.depth == 0 { 16 } else { 4 });
        let result = self.entries(&mut map, &mut entries);
        if self.depth == 0 {
            self.tally.top = Some(entries);
            return result.map(|()| Node::Null);
        }
        result.map(|()| Node::Object(entries))
    }
}

/// A member's name, borrowed where it holds no escape. (serde's own `Cow` would always copy.)
pub(super) struct Name<'a>(pub(super) Cow<'a, str>);

impl<'a> serde::Deserialize<'a> for Name<'a> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'a> Visitor<'a> for Reader {
            type Value = Name<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, value: &'a str) -> Result<Name<'a>, E> {
                Ok(Name(Cow::Borrowed(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Name<'a>, E> {
                Ok(Name(Cow::Owned(value.to_owned())))
            }
        }
        deserializer.deserialize_str(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        depth: 4,
        values: 100,
    };

    fn flaws(text: &str) -> Vec<String> {
        let mut errors = Errors::default();
        parse(text, BOUNDS).report(&mut errors);
        errors.into_list().into_iter().map(|e| e.pointer).collect()
    }

    #[test]
    fn values_are_read_as_serde_json_reads_them() {
        let text = r#"{"a":[1,-2,3.5,true,null,"x\u00e9\n"],"b":{"c":{}}}"#;
        let document = parse(text, BOUNDS);
        assert!(document.syntax.is_none());
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(document.root.into_value(), expected);
    }

    #[test]
    fn duplicates_depth_and_nul_are_found_with_their_places() {
        assert_eq!(flaws(r#"{"a":1,"b":{"x":1,"\u0078":2},"a":3}"#), ["/b/x", "/a"]);
        assert_eq!(
            flaws(r#"{"a":[[[[]]]],"b":[[{"c":[]}]]}"#),
            ["/a/0/0/0", "/b/0/0/c"]
        );
        assert_eq!(flaws(r#"{"a":["\u0000"]}"#), ["/a/0"]);
        let many: Vec<String> = (0..40).map(|n| format!(r#""k{}":0"#, n % 39)).collect();
        assert_eq!(flaws(&format!("{{{}}}", many.join(","))), ["/k0"]);
    }

    #[test]
    fn deep_nesting_is_skipped_without_recursion() {
        let text = format!(
            r#"{{"a":{}{},"id":"7"}}"#,
            "[".repeat(200_000),
            "]".repeat(200_000)
        );
        let document = parse(&text, BOUNDS);
        assert!(document.syntax.is_none() && document.flaws.too_deep);
        assert!(matches!(document.root, Node::Object(entries) if entries.len() == 2));
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let text = format!("[{}0]", "[],".repeat(500_000));
        let document = parse(&text, BOUNDS);
        assert!(document.flaws.too_many && document.syntax.is_none());
        assert!(matches!(document.root, Node::Array(items) if items.len() < 100));
    }

    #[test]
    fn what_came_before_a_syntax_error_is_kept() {
        let document = parse(r#"{"tenant":"acme","id":"#, BOUNDS);
        assert!(document.syntax.is_some());
        assert!(matches!(document.root, Node::Object(entries) if entries.len() == 1));
    }

    #[test]
    fn broken_json_is_refused() {
        for text in [
            "",
            "{",
            "{}x",
            "{'a':1}",
            "[1,]",
            "NaN",
            "1e999",
            "\"\\ud800\"",
            "\"\\udc00\\ud800\"",
            "\"a\nb\"",
            "01",
            "// c\n{}",
        ] {
            assert!(parse(text, BOUNDS).syntax.is_some(), "{text}");
        }
    }
}
