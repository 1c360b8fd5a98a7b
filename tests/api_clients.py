"""Clients of others, each a function: run as a script in an environment that has them,
`api_clients.py NAME URL TEXTS`, it prints what the client got as JSON."""

import asyncio
import json
import sys


def openai(url, texts):
    from openai import OpenAI

    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        # Without encoding_format it asks for base64.
        asked = [client.embeddings.create(model="tiny", input=texts)]
        asked += [client.embeddings.create(model="tiny", input=texts, encoding_format="float")]
        asked += [client.embeddings.create(model="tiny", input=text) for text in texts]
        models = [model.id for model in client.models.list()]
    assert models == ["tiny", "ranks"], models
    assert asked[0].usage.total_tokens == asked[1].usage.total_tokens > 0
    rows = [[each.embedding for each in response.data] for response in asked[:2]]
    return [*rows, [response.data[0].embedding for response in asked[2:]]]


def openai_async(url, texts):
    from openai import AsyncOpenAI

    async def main():
        async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            one = [client.embeddings.create(model="tiny", input=text) for text in texts]
            return [response.data[0].embedding for response in await asyncio.gather(*one)]

    return [asyncio.run(main())]


def openai_dimensions(url, texts):
    from openai import OpenAI

    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        response = client.embeddings.create(model="tiny", input=texts, dimensions=6)
    return [[each.embedding for each in response.data]]


def openai_errors(url, texts):
    from openai import BadRequestError, NotFoundError, OpenAI

    told = []
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        for model, given in (("tiny", []), ("none", texts)):
            try:
                client.embeddings.create(model=model, input=given)
            except (BadRequestError, NotFoundError) as error:
                told.append([error.status_code, error.body["message"]])
    return told


def huggingface_hub(url, texts):
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=url)
    alone = [client.feature_extraction(text, normalize=True)[0].tolist() for text in texts]
    return [client.feature_extraction(texts).tolist(), alone]


def langchain_openai(url, texts):
    from langchain_openai import OpenAIEmbeddings

    # Otherwise it sends the ids of another tokenizer.
    model = OpenAIEmbeddings(
        model="tiny", base_url=url + "/v1", api_key="none", check_embedding_ctx_length=False
    )
    return [model.embed_documents(texts), [model.embed_query(text) for text in texts]]


def langchain_huggingface(url, texts):
    from huggingface_hub import InferenceClient
    from langchain_huggingface import HuggingFaceEndpointEmbeddings

    model = HuggingFaceEndpointEmbeddings(model="a/model", huggingfacehub_api_token="none")
    # It takes names on the hub alone; what it asks with takes an address.
    model.client = InferenceClient(model=url)
    return [model.embed_documents(texts), [model.embed_query(text) for text in texts]]


def cohere(url, texts):
    from cohere import ClientV2

    client = ClientV2(api_key="none", base_url=url)
    found = client.embed(
        model="tiny", texts=texts, input_type="search_document", embedding_types=["float"]
    )
    ranked = client.rerank(model="ranks", query=texts[0], documents=texts)
    assert sorted(each.index for each in ranked.results) == list(range(len(texts)))
    return [found.embeddings.float_]


if __name__ == "__main__":
    name, url, texts = sys.argv[1:]
    print(json.dumps(globals()[name](url, json.loads(texts))))
