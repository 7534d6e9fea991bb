-- Who may send, and how: tenants, their accounts. Names compare by bytes, so that "acme/" sorts before "acme/main".

CREATE TABLE installation (
    only_one   boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    -- Keys the Message-ID and, later, VERP: fixed for the life of the installation, not a credential.
    secret     bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO installation DEFAULT VALUES;

CREATE TABLE tenant (
    id                text COLLATE "C" PRIMARY KEY CHECK (id ~ '^(-|[A-Za-z0-9][A-Za-z0-9_-]{0,63})$'),
    name              text,
    fallback          text NOT NULL DEFAULT 'never' CHECK (fallback IN ('never', 'platform')),
    on_uncertain      text NOT NULL DEFAULT 'resend' CHECK (on_uncertain IN ('resend', 'hold')),
    -- [{"limit": 60, "per": 60000000, "unit": "messages"}], "per" in microseconds
    limits            jsonb NOT NULL DEFAULT '[]',
    large_file_bytes  bigint CHECK (large_file_bytes > 0),
    large_file_action text NOT NULL DEFAULT 'warn' CHECK (large_file_action IN ('warn', 'reject', 'rewrite')),
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO tenant (id, name) VALUES ('-', 'platform');

CREATE TABLE account (
    tenant               text COLLATE "C" NOT NULL REFERENCES tenant ON DELETE CASCADE,
    id                   text COLLATE "C" NOT NULL CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    host                 text NOT NULL,
    port                 integer NOT NULL CHECK (port BETWEEN 1 AND 65535),
    tls                  text NOT NULL CHECK (tls IN ('none', 'starttls', 'implicit')),
    username             text,
    password             text,          -- sealed, see docs/security.md
    allow_plaintext_auth boolean NOT NULL DEFAULT false,
    ca_pem               text,
    from_address         text,          -- "a@b" or "Name <a@b>"
    limits               jsonb NOT NULL DEFAULT '[]',
    max_connections      integer CHECK (max_connections > 0),
    max_attempts         integer CHECK (max_attempts > 0),
    max_age_seconds      bigint CHECK (max_age_seconds > 0),
    is_default           boolean NOT NULL DEFAULT false,
    -- Rises whenever host, port, TLS or credentials change: connections of an older version are not used again.
    version              bigint NOT NULL DEFAULT 1,
    created_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, id)
);
CREATE UNIQUE INDEX account_default ON account (tenant) WHERE is_default;
