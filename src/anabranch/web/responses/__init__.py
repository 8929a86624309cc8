"""OpenAI's Responses API on top of chat: a request becomes one of chat, the answer or its stream becomes a response.

What holds state on the server (``previous_response_id``, ``conversation``, ``background``) and tools that run there are refused: nothing
here keeps a conversation. Fields that chat has too, and those nobody knows, pass through. A gateway and a server of a model both use it.

    request     what is asked, as a chat
    tools       tools, as functions
    thoughts    what a model thought, sealed for whoever gets it back
    items       what a response is made of
    answer      a whole response
    stream      its events
"""

from anabranch.web.api_error import ApiError
from anabranch.web.responses.answer import to_response
from anabranch.web.responses.request import to_chat
from anabranch.web.responses.stream import ResponseStream

__all__ = ["ApiError", "ResponseStream", "to_chat", "to_response"]
