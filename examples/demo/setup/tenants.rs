//! Tenants, accounts and webhook endpoints, through the command line.

use super::World;
use crate::plan::{LARGE_FILE_BYTES, NEWS_CONNECTIONS, NEWS_LIMITS, PLATFORM_FROM};
use crate::screen::Screen;

/// Tenants with an endpoint of their own; `-` is for all others.
const ENDPOINTS: [&str; 4] = ["acme", "globex", "hooli", "-"];

/// Users of the SMTP server: one per account, so that it knows which one sends.
pub(super) const LOGINS: [(&str, &str, &str, &str); 5] = [
    ("acme", "main", "acme-main", "Acme Shop <shop@acme.example>"),
    ("acme", "news", "acme-news", "Acme News <news@acme.example>"),
    ("globex", "main", "globex-main", "orders@globex.example"),
    (
        "initech",
        "main",
        "initech-main",
        "Initech <hello@initech.example>",
    ),
    ("-", "main", "platform", PLATFORM_FROM),
];

impl World {
    pub(super) async fn tenants(&self, screen: &Screen) -> Result<(), String> {
        let large = LARGE_FILE_BYTES.to_string();
        let rewrite = [
            "--large-file-bytes",
            large.as_str(),
            "--large-file-action",
            "rewrite",
        ];
        for (tenant, flags) in [
            ("acme", [&["--name", "Acme Ltd"], &rewrite[..]].concat()),
            ("globex", rewrite.to_vec()),
            ("initech", Vec::new()),
            ("hooli", vec!["--name", "Hooli", "--fallback", "platform"]),
            ("umbrella", Vec::new()),
        ] {
            self.command(screen, &[&["tenant", "set", tenant], &flags[..]].concat(), "")
                .await?;
        }
        let port = self.smtp.port().to_string();
        let limits = NEWS_LIMITS.map(|(count, seconds)| format!("{count}/{seconds}s"));
        let connections = NEWS_CONNECTIONS.to_string();
        for (tenant, account, login, from) in LOGINS {
            let mut arguments = vec!["account", "set", tenant, account];
            if login == "acme-news" {
                arguments.extend(["--limit", &limits[0], "--limit", &limits[1]]);
                arguments.extend(["--max-connections", &connections]);
            }
            arguments.extend(["--host", "127.0.0.1", "--port", &port, "--tls", "starttls"]);
            arguments.extend(["--from", from, "--username", login, "--password-stdin"]);
            self.command(screen, &arguments, &self.passwords[login]).await?;
        }
        Ok(())
    }

    pub(super) async fn endpoints(&mut self, screen: &Screen) -> Result<(), String> {
        for tenant in ENDPOINTS {
            let url = self.hooks.url(&hook_path(tenant));
            let arguments = ["endpoint", "set", tenant, "--url", &url, "--generate-secret"];
            let secret = self.command(screen, &arguments, "").await?;
            self.secrets.insert(tenant, secret.trim().to_owned());
        }
        Ok(())
    }
}

pub(super) fn hook_path(tenant: &str) -> String {
    match tenant {
        "-" => "/hooks/everybody-else".to_owned(),
        tenant => format!("/hooks/{tenant}"),
    }
}
