//! Who uses a stack: people, their organizations, and the carrier accounts they call through.

use super::Stack;
use crate::parts::{keys::Keys, postgres::Role};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shared::seal::Sealer;
use url::Url;
use uuid::Uuid;

/// A user with a token.
#[derive(Debug, Clone)]
pub struct User {
    /// Id in `auth.users`.
    pub id: Uuid,
    /// Email address.
    pub email: String,
    /// A token that is good for a day.
    pub jwt: String,
}

/// An organization and the user who signed it up.
#[derive(Debug, Clone)]
pub struct Organization {
    /// Its id.
    pub id: Uuid,
    /// Its owner.
    pub owner: User,
}

/// A carrier account as the platform knows it.
#[derive(Debug, Clone)]
pub struct CarrierAccount {
    /// Id of the row.
    pub id: Uuid,
    /// Which carrier's protocol it speaks.
    pub provider: String,
    /// Name of the account at the carrier.
    pub auth_id: String,
    /// Its password, which signs callbacks too.
    pub auth_token: String,
    /// Root of the carrier's API.
    pub api_url: Url,
}

impl Stack {
    /// Makes a user as Supabase Auth does when a person has signed up and confirmed the address.
    pub async fn create_user(&self, email: &str, name: &str) -> Result<User> {
        let client = self.connect(Role::AuthAdmin).await?;
        create_user(&client, &self.keys, email, name).await
    }

    /// Signs an organization up as its owner's browser does: a user, then `create_organization` under that user's token.
    pub async fn sign_up(&self, name: &str, email: &str) -> Result<Organization> {
        let owner = self.create_user(email, name).await?;
        let made = self.call(&owner.jwt, "create_organization", &json!({ "name": name })).await?;
        let id =
            made["organization_id"].as_str().context("create_organization returned no organization_id")?.parse()?;
        Ok(Organization { id, owner })
    }

    /// Calls a database function under a user's token, as `supabase.rpc()` does; fails with what PostgREST answered.
    ///
    /// Goes past somebody else's PostgREST in front: it may not be there before it is told where ours is.
    pub async fn call(&self, jwt: &str, function: &str, arguments: &Value) -> Result<Value> {
        let rest = if self.rest_is_ours {
            self.rest_url()
        } else {
            self.postgrest_url.as_str().trim_end_matches('/').to_owned()
        };
        let response = self
            .http
            .post(format!("{rest}/rpc/{function}"))
            .header("apikey", &self.keys.publishable_key)
            .bearer_auth(jwt)
            .json(arguments)
            .send()
            .await?;
        let status = response.status();
        let text = response.text().await?;
        ensure!(status.is_success(), "{function}: {status} {text}");
        Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? })
    }

    /// Makes a Plivo account that all organizations may dial through, its token sealed with the stack's key.
    pub async fn create_carrier_account(
        &self,
        provider: &str,
        api_url: &Url,
        auth_id: &str,
        auth_token: &str,
    ) -> Result<CarrierAccount> {
        let id = Uuid::new_v4();
        let sealed = Sealer::new(&self.keys.secrets()?.seal_keys)?.seal(auth_token, &id.to_string())?;
        let base = api_url.as_str().trim_end_matches('/');
        self.connect(Role::Owner)
            .await?
            .execute(
                "insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base) \
                 values ($1, $5::text::public.carrier_provider, $2, $3, $4)",
                &[&id, &auth_id, &sealed, &base, &provider],
            )
            .await
            .context("cannot make the carrier account")?;
        Ok(CarrierAccount {
            id,
            provider: provider.to_owned(),
            auth_id: auth_id.to_owned(),
            auth_token: auth_token.to_owned(),
            api_url: api_url.clone(),
        })
    }

    /// Gives an organization a number of the account to call from.
    pub async fn add_caller_number(&self, organization: Uuid, account: Uuid, phone_number: &str) -> Result<()> {
        self.connect(Role::Owner)
            .await?
            .execute(
                "insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values ($1, $2, $3)",
                &[&organization, &account, &phone_number],
            )
            .await
            .context("cannot add the caller number")?;
        Ok(())
    }
}

/// Makes a user over a connection as `supabase_auth_admin`, with a token of `keys`.
pub async fn create_user(client: &tokio_postgres::Client, keys: &Keys, email: &str, name: &str) -> Result<User> {
    let id = Uuid::new_v4();
    client
        .execute(
            "insert into auth.users (instance_id, id, aud, role, email, email_confirmed_at, raw_app_meta_data, raw_user_meta_data, \
             created_at, updated_at) values ('00000000-0000-0000-0000-000000000000', $1, 'authenticated', 'authenticated', $2, now(), \
             '{\"provider\": \"email\", \"providers\": [\"email\"]}', $3, now(), now())",
            &[&id, &email, &json!({ "full_name": name })],
        )
        .await
        .with_context(|| format!("cannot sign up {email}"))?;
    Ok(User { id, email: email.to_owned(), jwt: keys.user_jwt(id, email)? })
}
