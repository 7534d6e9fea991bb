//! Where in the job something is wrong, and the list of all that is.

use std::fmt::Write as _;

use super::bounds::MAX_ERRORS;
use crate::report::FieldError;

/// A position in the document. A chain on the stack: it costs nothing until an error is written.
#[derive(Clone, Copy)]
pub(super) struct Pointer<'a> {
    parent: Option<&'a Pointer<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// The whole document.
pub(super) const ROOT: Pointer<'static> = Pointer {
    parent: None,
    step: Step::Key(""),
};

impl<'a> Pointer<'a> {
    pub(super) fn key(&'a self, name: &'a str) -> Pointer<'a> {
        Pointer {
            parent: Some(self),
            step: Step::Key(name),
        }
    }

    pub(super) fn index(&'a self, index: usize) -> Pointer<'a> {
        Pointer {
            parent: Some(self),
            step: Step::Index(index),
        }
    }

    /// As RFC 6901 writes it. Names come from outside, so long ones are cut.
    fn render(&self) -> String {
        let mut text = self.parent.map_or_else(String::new, Pointer::render);
        if self.parent.is_some() {
            match self.step {
                Step::Index(index) => {
                    let _ = write!(text, "/{index}");
                }
                Step::Key(name) => {
                    text.push('/');
                    text.push_str(&clean(name).replace('~', "~0").replace('/', "~1"));
                }
            }
        }
        text
    }
}

/// All that is wrong with a job, bounded.
#[derive(Default)]
pub(super) struct Errors {
    list: Vec<FieldError>,
    beyond: usize,
}

impl Errors {
    pub(super) fn push(&mut self, at: &Pointer<'_>, message: impl Into<String>) {
        if self.list.len() >= MAX_ERRORS {
            self.beyond += 1;
            return;
        }
        self.list.push(FieldError {
            pointer: at.render(),
            message: message.into(),
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn into_list(mut self) -> Vec<FieldError> {
        if self.beyond > 0 {
            self.list.push(FieldError {
                pointer: String::new(),
                message: format!("and {} more errors", self.beyond),
            });
        }
        self.list
    }
}

/// A value as error messages may show it: short, in back quotes, control characters replaced.
pub(super) fn excerpt(value: &str) -> String {
    format!("`{}`", clean(value))
}

fn clean(value: &str) -> String {
    const SHOWN: usize = 48;
    let mut shown: String = value
        .chars()
        .take(SHOWN)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if value.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_written_as_rfc_6901_says() {
        let list = ROOT.key("a/b~c");
        assert_eq!(list.index(3).render(), "/a~1b~0c/3");
        assert_eq!(ROOT.render(), "");
    }

    #[test]
    fn errors_are_bounded_and_say_how_many_there_were() {
        let mut errors = Errors::default();
        for index in 0..MAX_ERRORS + 7 {
            errors.push(&ROOT.index(index), "no");
        }
        let list = errors.into_list();
        assert_eq!(list.len(), MAX_ERRORS + 1);
        assert_eq!(list[MAX_ERRORS].message, "and 7 more errors");
    }

    #[test]
    fn an_excerpt_is_short_and_without_control_characters() {
        assert_eq!(excerpt("a\nb"), "`a\u{fffd}b`");
        assert!(excerpt(&"x".repeat(1000)).len() < 60);
    }
}
