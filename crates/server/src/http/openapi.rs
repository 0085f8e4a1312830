//! The API's description: OpenAPI 3.1, made of the routes' attributes and what all routes have in common.

use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, InfoBuilder, ObjectBuilder, OpenApi, PathItem, Ref, RefOr, ResponseBuilder,
    SecurityRequirement, Type,
};
use utoipa::{PartialSchema, ToSchema};

use super::idempotency;
use crate::model::Failure;

/// What any request may be answered with, and when.
const FAILURES: [(&str, &str); 13] = [
    ("400", "The request is wrong: the code says how."),
    ("401", "There is no API key, or a wrong one."),
    ("403", "The server does not grant that, or only serves what is local."),
    ("404", "There is no such thing."),
    ("405", "The route does not know the method."),
    ("408", "The body did not arrive in time."),
    ("409", "It is not in a state for that."),
    ("413", "It is too large."),
    ("415", "The body is not said to be JSON."),
    ("422", "The idempotency key was sent with another request."),
    ("429", "Too many wait already."),
    ("500", "The server failed; its log knows the request's id."),
    ("507", "The disk is full."),
];

/// Puts the two parts together and adds what all have in common.
pub(super) fn complete(mut document: OpenApi, creating: OpenApi) -> String {
    let mut creating = creating;
    creating.paths.paths.values_mut().flat_map(operations).for_each(take_key);
    document.merge(creating);
    document.info = InfoBuilder::new()
        .title("agentkernel")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Runs commands in secure, isolated microVMs."))
        .build();
    let mut components = document.components.take().unwrap_or_default();
    components.schemas.insert(Failure::name().into_owned(), Failure::schema());
    let key = ApiKey::Header(ApiKeyValue::new("x-api-key"));
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    components.security_schemes.insert("bearer".to_owned(), RefOr::T(bearer));
    components.security_schemes.insert("key".to_owned(), RefOr::T(SecurityScheme::ApiKey(key)));
    document.components = Some(components);
    document.security = Some(vec![
        // Where the server has no key.
        SecurityRequirement::default(),
        SecurityRequirement::new("bearer", Vec::<String>::new()),
        SecurityRequirement::new("key", Vec::<String>::new()),
    ]);
    document.paths.paths.values_mut().flat_map(operations).for_each(may_fail);
    // The router's sign for what may have slashes is none of the document's.
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    serde_json::to_string_pretty(&document).unwrap_or_default()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete]
        .into_iter()
        .flat_map(Option::as_mut)
}

/// Adds the header of requests that create.
fn take_key(operation: &mut Operation) {
    let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(255));
    let parameter = ParameterBuilder::new()
        .name(idempotency::HEADER)
        .parameter_in(ParameterIn::Header)
        .description(Some("Sent again with the same request, it is answered again and not done again."))
        .schema(Some(text.build()))
        .build();
    operation.parameters.get_or_insert_default().push(RefOr::T(parameter));
}

/// Adds the answers about what went wrong.
fn may_fail(operation: &mut Operation) {
    for (status, when) in FAILURES {
        let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(Failure::name()))).build();
        let response = ResponseBuilder::new().description(when).content("application/json", body).build();
        operation.responses.responses.entry(status.to_owned()).or_insert(RefOr::T(response));
    }
}
