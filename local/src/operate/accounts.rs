//! `accounts`: what the platform is at carriers and payment gateways. Credentials come by the standard input, are sealed here for their row
//! under the stack's key, and are never printed. `reseal` seals everything anew, so that an old key can go.

use super::{
    aws,
    database::{Place, said},
    table,
};
use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde_json::Value;
use shared::{seal::Sealer, secrets::Secrets};
use std::io::Read;
use tokio_postgres::Client;
use url::Url;
use uuid::Uuid;

/// What to do with accounts.
#[derive(Debug, Subcommand)]
pub enum Accounts {
    /// Enter an account at a phone carrier; its credentials by the standard input, as docs/carriers.md lists them.
    AddCarrier {
        /// plivo, twilio, telnyx or vonage.
        provider: String,
        /// The account's id at the carrier.
        #[arg(long)]
        sid: String,
        /// The carrier's API, as docs/carriers.md names it.
        #[arg(long, value_name = "URL")]
        api_base: Url,
        /// Whose it is; without it the platform's own.
        #[arg(long, value_name = "ID")]
        organization: Option<Uuid>,
        /// A number to call from through it, E.164, which wants --organization or --for.
        #[arg(long)]
        number: Option<String>,
        /// The organization that calls from the number, where the account is the platform's.
        #[arg(long = "for", value_name = "ID")]
        caller: Option<Uuid>,
        /// Where keys and database are.
        #[command(flatten)]
        with: With,
    },
    /// Enter the platform's account at a payment gateway; its credentials by the standard input, as docs/billing.md lists them.
    AddGateway {
        /// stripe or razorpay.
        gateway: String,
        /// The gateway's API.
        #[arg(long, value_name = "URL")]
        api_base: Url,
        /// Where a payer comes back to.
        #[arg(long, value_name = "URL")]
        return_url: Option<Url>,
        /// The currencies that it takes; without it all.
        #[arg(long)]
        currency: Vec<String>,
        /// Where keys and database are.
        #[command(flatten)]
        with: With,
    },
    /// Enter the source of a gateway's webhooks; its secret by the standard input. Prints the path that the gateway calls.
    AddSource {
        /// stripe or razorpay.
        provider: String,
        /// Where keys and database are.
        #[command(flatten)]
        with: With,
    },
    /// Seal everything anew that an older key sealed. Afterwards the older keys can be taken out of the stack's secret.
    Reseal {
        /// Say how much would be, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// Where keys and database are.
        #[command(flatten)]
        with: With,
    },
}

/// Where the seal keys and the database are.
#[derive(Debug, Args)]
pub struct With {
    /// The CloudFormation stack, whose secret has the seal keys.
    #[arg(long, required_unless_present = "secret_file")]
    stack: Option<String>,
    /// A file with the stack's secret, as docs/deploy.md writes it, in place of the stack's.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<std::path::PathBuf>,
    /// Where AWS is, for an emulator of it.
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL")]
    aws_url: Option<Url>,
    /// Where the database is.
    #[command(flatten)]
    place: Place,
}

impl With {
    /// The secret in a file, and a database.
    pub fn of(secret_file: &std::path::Path, database_url: &str) -> Self {
        Self { stack: None, secret_file: Some(secret_file.to_owned()), aws_url: None, place: Place::of(database_url) }
    }

    async fn secrets(&self) -> Result<Secrets> {
        let secret: Value = match (&self.secret_file, &self.stack) {
            (Some(file), _) => {
                let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
                serde_json::from_str(&text).context("the stack's secret is no JSON")?
            }
            (None, Some(stack)) => {
                let config = aws::config().await;
                let outputs = aws::outputs(&config, stack, self.aws_url.as_ref()).await?;
                let arn = outputs.get("SecretArn").with_context(|| format!("{stack} gives out no SecretArn"))?;
                aws::secret(&config, arn, self.aws_url.as_ref()).await?
            }
            (None, None) => anyhow::bail!("--stack says where the keys are"),
        };
        serde_json::from_value(secret).context("the stack's secret has not the documented shape")
    }
}

/// Does it, and says what to print. `given` are the credentials, where some are wanted.
pub async fn run(command: &Accounts, given: impl Read) -> Result<String> {
    match command {
        Accounts::AddCarrier { provider, sid, api_base, organization, number, caller, with } => {
            let (id, sealed) = sealed(with, given).await?;
            let base = api_base.as_str().trim_end_matches('/');
            let calls = number.as_ref().map(|number| Some((number, caller.or(*organization)?)));
            ensure!(calls != Some(None), "say whose number it is: --organization or --for");
            let mut client = with.place.connect().await?;
            let transaction = client.transaction().await?;
            let account = "insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
                values ($1, $2, $3::text::public.carrier_provider, $4, $5, $6)";
            transaction.execute(account, &[&id, organization, provider, sid, &sealed, &base]).await.map_err(said)?;
            if let Some(Some((number, caller))) = calls {
                let row = "insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values ($1, $2, $3)";
                transaction.execute(row, &[&caller, &id, number]).await.map_err(said)?;
            }
            transaction.commit().await?;
            Ok(format!("carrier account {id}; point its numbers at <CallbackUrl>/{provider}/inbound/{id}\n"))
        }
        Accounts::AddGateway { gateway, api_base, return_url, currency, with } => {
            let (id, sealed) = sealed(with, given).await?;
            let (base, back) = (api_base.as_str().trim_end_matches('/'), return_url.as_ref().map(Url::as_str));
            let currencies = (!currency.is_empty()).then_some(currency);
            let row = "insert into private.payment_accounts (id, gateway, credentials_sealed, api_base, return_url, currencies)
                values ($1, $2::text::public.payment_gateway, $3, $4, $5, $6)";
            let client = with.place.connect().await?;
            client.execute(row, &[&id, gateway, &sealed, &base, &back, &currencies]).await.map_err(said)?;
            Ok(format!("payment account {id}\n"))
        }
        Accounts::AddSource { provider, with } => {
            let (id, sealed) = sealed(with, given).await?;
            let row = "insert into public.webhook_sources (id, provider, name, secrets_sealed) values ($1, $2, $2, array[$3])";
            with.place.connect().await?.execute(row, &[&id, provider, &sealed]).await.map_err(said)?;
            Ok(format!("source {id}; the gateway calls <CallbackUrl>/{provider}/{id}\n"))
        }
        Accounts::Reseal { dry_run, with } => reseal(with, *dry_run).await,
    }
}

/// A new row's id, and what was given sealed for it.
async fn sealed(with: &With, given: impl Read) -> Result<(Uuid, String)> {
    let mut text = String::new();
    given.take(64 * 1024).read_to_string(&mut text)?;
    let text = text.trim();
    ensure!(!text.is_empty(), "give the credentials by the standard input");
    let id = Uuid::new_v4();
    Ok((id, Sealer::new(&with.secrets().await?.seal_keys)?.seal(text, &id.to_string())?))
}

/// Every text that is sealed for a row's id: the table, its id, and the column.
const SEALED: [(&str, &str, &str); 5] = [
    ("public.carrier_accounts", "id", "credentials_sealed"),
    ("private.payment_accounts", "id", "credentials_sealed"),
    ("private.webhook_endpoint_secrets", "endpoint_id", "secret_sealed"),
    ("private.webhook_endpoint_secrets", "endpoint_id", "previous_sealed"),
    ("public.webhook_sources", "id", "secrets_sealed"),
];

async fn reseal(with: &With, dry_run: bool) -> Result<String> {
    let keys = with.secrets().await?.seal_keys;
    let current = format!("v1.{}.%", keys.first().context("the stack's secret has no seal key")?.id);
    let sealer = Sealer::new(&keys)?;
    let mut client = with.place.connect().await?;
    let transaction = client.transaction().await?;
    let mut told = Vec::new();
    for (relation, id, column) in SEALED {
        let count = of_column(transaction.client(), &sealer, (relation, id, column), &current).await?;
        told.push(vec![relation.to_owned(), column.to_owned(), count.to_string()]);
    }
    // A dry run is the real thing, taken back: it shows that every text opens.
    if dry_run {
        transaction.rollback().await?;
    } else {
        transaction.commit().await?;
    }
    Ok(table(&["table", "column", if dry_run { "would be sealed anew" } else { "sealed anew" }], &told))
}

async fn of_column(
    client: &Client,
    sealer: &Sealer,
    (relation, id, column): (&str, &str, &str),
    current: &str,
) -> Result<usize> {
    // A list of secrets is sealed text by text; a single one is a list of one here.
    let is_list = column == "secrets_sealed";
    let (texts, old) = match is_list {
        true => (column.to_owned(), format!("exists (select from unnest({column}) as one where one not like $1)")),
        false => (format!("array[{column}]"), format!("{column} not like $1")),
    };
    let rows = client
        .query(
            &format!("select {id}, {texts} from {relation} where {old} order by {id} for no key update"),
            &[&current],
        )
        .await?;
    for row in &rows {
        let (own, texts): (Uuid, Vec<String>) = (row.get(0), row.get(1));
        let anew = texts
            .iter()
            .map(|text| sealer.seal(&sealer.open(text, &own.to_string())?, &own.to_string()))
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("{relation} {own}"))?;
        let value = if is_list { "$2::text[]" } else { "($2::text[])[1]" };
        client.execute(&format!("update {relation} set {column} = {value} where {id} = $1"), &[&own, &anew]).await?;
    }
    Ok(rows.len())
}
