//! Where something can be put into an HTML document so that it is shown: enough of a tokenizer to tell markup from
//! comments, raw text and attribute values.

/// Elements whose content is text up to their end tag (HTML §13.2.5).
const RAW: &[&str] = &[
    "script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes",
];

/// The byte position: before the last `</body>`, else the last `</html>`, else the end, but never inside something that
/// is left open.
pub(super) fn point(html: &str) -> usize {
    let bytes = html.as_bytes();
    let (mut body, mut document) = (None, None);
    let mut at = 0;
    while let Some(start) = find(bytes, b"<", at) {
        let end = match bytes.get(start + 1) {
            Some(b'!') if bytes[start..].starts_with(b"<!--") => comment_end(bytes, start),
            Some(b'!' | b'?') => find(bytes, b">", start).map(|end| end + 1),
            Some(b'/') if bytes.get(start + 2).is_some_and(u8::is_ascii_alphabetic) => {
                if is_name(bytes, start + 2, "body") {
                    body = Some(start);
                } else if is_name(bytes, start + 2, "html") {
                    document = Some(start);
                }
                tag_end(bytes, start)
            }
            Some(first) if first.is_ascii_alphabetic() => element_end(bytes, start),
            _ => Some(start + 1),
        };
        match end {
            Some(end) => at = end,
            None => return body.or(document).unwrap_or(start),
        }
    }
    body.or(document).unwrap_or(html.len())
}

/// After the comment that begins here; `<!-->` and `<!--->` are whole ones.
fn comment_end(bytes: &[u8], start: usize) -> Option<usize> {
    if bytes[start..].starts_with(b"<!-->") {
        return Some(start + 5);
    }
    find(bytes, b"-->", start + 3).map(|end| end + 3)
}

/// After the start tag that begins here and, for raw text, after its content.
fn element_end(bytes: &[u8], start: usize) -> Option<usize> {
    let end = tag_end(bytes, start)?;
    let Some(raw) = RAW.iter().find(|name| is_name(bytes, start + 1, name)) else {
        return Some(end);
    };
    let mut at = end;
    loop {
        let close = find(bytes, b"</", at)?;
        if is_name(bytes, close + 2, raw) {
            return tag_end(bytes, close);
        }
        at = close + 2;
    }
}

/// After the `>` of the tag that begins here; not one inside quotes.
fn tag_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut quote = None;
    for (offset, &byte) in bytes[start..].iter().enumerate() {
        match (quote, byte) {
            (None, b'>') => return Some(start + offset + 1),
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), byte) if byte == open => quote = None,
            _ => {}
        }
    }
    None
}

/// Whether a tag of this name begins here.
fn is_name(bytes: &[u8], at: usize, name: &str) -> bool {
    let end = at + name.len();
    bytes
        .get(at..end)
        .is_some_and(|found| found.eq_ignore_ascii_case(name.as_bytes()))
        && bytes
            .get(end)
            .is_none_or(|next| next.is_ascii_whitespace() || matches!(next, b'>' | b'/'))
}

fn find(bytes: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let found = bytes
        .get(from..)?
        .windows(needle.len())
        .position(|window| window == needle)?;
    Some(from + found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_before_the_last_end_of_body_that_is_markup() {
        for (html, rest) in [
            ("<body>x</body>", "</body>"),
            ("<body>x</BODY >y", "</BODY >y"),
            ("<p>x</p>", ""),
            ("<html>x</html>\n", "</html>\n"),
            ("<body>a</body><body>b</body>", "</body>"),
            ("<body>x</body><!-- </body> -->", "</body><!-- </body> -->"),
            ("<body><script>'</body>'</script>x</body>", "</body>"),
            ("<body><STYLE></body></STYLE>x</body>", "</body>"),
            ("<body><a title='</body>'>x</a></body>", "</body>"),
            ("<body>1 < 2</body>", "</body>"),
            ("<!-->x</body>", "</body>"),
            ("x</bodyguard>", ""),
            ("", ""),
        ] {
            assert_eq!(&html[point(html)..], rest, "{html}");
        }
    }

    #[test]
    fn the_place_is_never_inside_something_left_open() {
        for (html, rest) in [
            ("<p>x</p><!-- open", "<!-- open"),
            ("<p>x</p><script>open", "<script>open"),
            ("<p>x</p><a href=\"open>y", "<a href=\"open>y"),
            ("<body>x</body><!-- open", "</body><!-- open"),
        ] {
            assert_eq!(&html[point(html)..], rest, "{html}");
        }
    }
}
