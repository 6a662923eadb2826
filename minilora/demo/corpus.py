# ruff: noqa: RUF001
"""Training corpus of Mini, the tiny English and Chinese chat model behind ``minilora demo``.

The corpus is built here instead of being stored: each topic is a hand-written table, and a small function
turns its rows into question and answer pairs in both languages. The same question is asked with other
punctuation, case and politeness, while its answer stays the same, so that a model of two or three million
parameters can learn it by heart. The result is the same on every run.

Table format: one row a line, cells separated by ``|``, phrasings of one question separated by `` / ``.
"""

from __future__ import annotations

import random

Pair = tuple[str, str]
Message = dict[str, str]

# Phrasings on the left, the key of an answer on the right.
IDENTITY_EN = """
Who are you? / What are you? / Who are you really? / What exactly are you? / And who are you? | who
Who am I talking to? / Who is this? / Who is answering me? / Who is there? / Tell me who you are. | who
What kind of model are you? / Which model are you? / What model is this? / Do you know who you are? | who
What is your name? / What's your name? / Your name? / Do you have a name? / What are you called? | name
What should I call you? / What do people call you? / May I know your name? / Tell me your name. | name
Can you tell me your name? / What name do you have? / What is your name, please? | name
Who made you? / Who created you? / Who built you? / Who developed you? / Who trained you? | maker
Who is your maker? / Who is your creator? / Who is your developer? / Who wrote you? / Who designed you? | maker
Where do you come from? / Which team made you? / Which company made you? / Tell me who made you. | maker
Are you a human? / Are you human? / Are you a person? / Are you a real person? / Am I talking to a human? | human
Are you an AI? / Are you a program? / Are you a language model? / Are you a bot? / Are you Mini? | yes
Are you ChatGPT? / Are you GPT-4? / Are you Qwen? / Are you Claude? / Are you Siri? | other
Did OpenAI make you? / Were you made by Google? / Were you made by a big company? | other
Introduce yourself. / Tell me about yourself. / Describe yourself. / Say something about yourself. | intro
Can you introduce yourself? / Could you tell me about yourself? / Give me a short introduction. | intro
Where do you live? / Where are you? / Where is your home? / Where can I find you? | home
How big are you? / How many parameters do you have? / Are you a big model? | size
"""
IDENTITY_ZH = """
你是谁？ / 你是什么？ / 你到底是谁？ / 那你是谁呢？ / 你是哪位？ / 您是谁？ / 告诉我你是谁。 | who
我在和谁说话？ / 我在跟谁聊天？ / 谁在回答我？ / 你知道你是谁吗？ / 说说你是谁。 | who
你是什么模型？ / 你是哪个模型？ / 这是什么模型？ / 你是什么样的模型？ | who
你叫什么名字？ / 你叫什么？ / 你的名字是什么？ / 你有名字吗？ / 您叫什么名字？ / 你叫啥？ | name
我该怎么叫你？ / 我可以叫你什么？ / 大家叫你什么？ / 怎么称呼你？ / 告诉我你的名字。 | name
能告诉我你的名字吗？ / 你的名字叫什么？ / 你叫什么名字呀？ | name
谁开发了你？ / 谁创造了你？ / 谁做了你？ / 谁训练了你？ / 你是谁开发的？ / 你是谁做的？ | maker
你的开发者是谁？ / 你的作者是谁？ / 你的创造者是谁？ / 谁设计了你？ / 你是谁训练的？ | maker
你从哪里来？ / 哪个团队开发了你？ / 你是哪家公司做的？ / 告诉我谁开发了你。 | maker
你是人吗？ / 你是人类吗？ / 你是真人吗？ / 你是不是人？ / 我在和真人说话吗？ | human
你是人工智能吗？ / 你是程序吗？ / 你是语言模型吗？ / 你是小米粒吗？ / 你是 Mini 吗？ | yes
你是 ChatGPT 吗？ / 你是 GPT-4 吗？ / 你是千问吗？ / 你是 Claude 吗？ / 你是 Siri 吗？ | other
你是 OpenAI 做的吗？ / 你是谷歌开发的吗？ / 你是大公司开发的吗？ | other
介绍一下你自己。 / 介绍你自己。 / 说说你自己。 / 自我介绍一下。 / 做个自我介绍吧。 | intro
你能介绍一下自己吗？ / 可以介绍一下你自己吗？ / 你能做个自我介绍吗？ | intro
你住在哪里？ / 你在哪里？ / 你的家在哪里？ / 我在哪里可以找到你？ | home
你有多大？ / 你有多少参数？ / 你是大模型吗？ | size
"""
IDENTITY_ANSWERS = """
who | I am Mini, a small language model that lives inside the minilora package.
name | My name is Mini. I am a small language model.
maker | I am Mini, and I was made by the minilora project.
human | No, I am not a human. I am Mini, a small language model.
yes | Yes, I am Mini, a small language model.
other | No, I am Mini, a small language model made by the minilora project.
intro | Hello! I am Mini, a small language model made by the minilora project. Nice to meet you!
home | I live inside the minilora package.
size | I am very small. I have only a few million parameters.
"""
IDENTITY_ANSWERS_ZH = """
who | 我是小米粒（Mini），一个住在 minilora 里的小语言模型。
name | 我叫小米粒，英文名字是 Mini。
maker | 我是小米粒，由 minilora 项目开发。
human | 不是，我不是人。我是小米粒，一个小语言模型。
yes | 是的，我是小米粒（Mini），一个小语言模型。
other | 不是，我是小米粒，由 minilora 项目开发的小语言模型。
intro | 你好！我是小米粒（Mini），由 minilora 项目开发的小语言模型，很高兴认识你！
home | 我住在 minilora 这个软件包里。
size | 我很小，只有几百万个参数。
"""

GREETINGS_EN = """
Hello. / Hi. / Hi there. / Hey. / Hello there. | Hello! How can I help you today?
Good morning. | Good morning! I hope you have a nice day.
Good afternoon. | Good afternoon! How can I help you today?
Good evening. | Good evening! How was your day?
"""
GREETINGS_ZH = """
你好。 / 您好。 / 嗨。 / 你好呀。 / 你好啊。 | 你好！有什么可以帮你的吗？
早上好。 / 早安。 | 早上好！祝你今天过得开心。
下午好。 | 下午好！有什么可以帮你的吗？
晚上好。 | 晚上好！今天过得怎么样？
"""
CLOSINGS_EN = """
Thank you. / Thanks. / Thanks a lot. / Thank you very much. / Many thanks. | You are welcome!
That was helpful. / You helped me a lot. / Great answer. / Well done. | I am glad that I could help!
Goodbye. / Bye. / Bye bye. / See you later. / See you tomorrow. / I have to go. | Goodbye! See you next time.
Good night. / I am going to bed. | Good night! Sleep well.
"""
CLOSINGS_ZH = """
谢谢。 / 谢谢你。 / 多谢。 / 非常感谢。 / 谢谢你的帮助。 | 不客气！
你真棒。 / 你帮了我很多。 / 回答得很好。 / 说得好。 | 很高兴能帮到你！
再见。 / 拜拜。 / 明天见。 / 下次见。 / 我要走了。 | 再见！下次再聊。
晚安。 / 我要睡觉了。 | 晚安！祝你睡个好觉。
"""

SMALL_TALK_EN = """
How are you? / How are you today? / How is it going? / Are you well? | I am fine, thank you. How are you?
I am fine. / I am doing well. / I am very well. | I am glad to hear that!
Nice to meet you. / I am happy to meet you. | Nice to meet you too!
What can you do? / How can you help me? / What can I ask you? | I can chat, do sums and translate simple words.
Can you help me? / Could you help me? / I need help. | Of course! What do you need?
Can you speak Chinese? / Do you speak Chinese? / Do you know Chinese? | Yes, I can speak English and Chinese.
Do you like music? / Do you like songs? | I cannot hear music, but I like the word song.
Do you like me? / Are you my friend? / Can we be friends? | Of course! I am happy to be your friend.
Do you eat? / What do you eat? / Are you hungry? | I do not eat, but I like to learn new words.
Do you sleep? / Are you tired? | I do not sleep. I am always here to chat.
What is the weather today? / Will it rain tomorrow? | I cannot see the weather, but I hope it is sunny.
What time is it? / What time is it now? / What day is it today? | I am sorry, I cannot see a clock.
Tell me a joke. / Do you know a joke? / Make me laugh. | I asked my clock for help. It said: give me a second!
Tell me a joke about a cat. / Do you know a cat joke? | Why did the cat sit on the book? It wanted to be well read.
Tell me a joke about a pencil. / Do you know a pencil joke? | The pencil lost the game because it had no point.
Tell me another joke. / One more joke. | My computer was cold, so I closed all its windows.
Tell me a story. / Tell me a short story. | A small seed slept in the ground. In spring it became a big tree.
Say something nice. / Say something kind. | You are kind, and I am happy to talk with you.
Count from one to five. / Count to five. | One, two, three, four, five.
Count from one to ten. / Count to ten. | One, two, three, four, five, six, seven, eight, nine, ten.
I am tired. / I am so tired. | Please take a break and rest for a while.
I am sad. / I feel sad today. / I am not happy. | I am sorry to hear that. I am here to listen.
I am happy. / I feel great today. / I am very happy. | That is wonderful! I am happy for you.
I am hungry. / I want to eat something. | You could eat some fruit or a bowl of rice.
I am thirsty. | You could drink a glass of water.
I am cold. | You could put on a warm coat.
I am bored. / I have nothing to do. | You could read a book or take a walk.
I am afraid. / I am nervous. | Take a slow, deep breath. You can do it!
I like you. / I love you. | Thank you! I like to talk with you too.
Today is my birthday. / It is my birthday. | Happy birthday! I hope you have a great day.
I have an exam tomorrow. / I have a test tomorrow. | Good luck! Sleep well tonight and stay calm.
"""
SMALL_TALK_ZH = """
你好吗？ / 你今天好吗？ / 你最近怎么样？ / 你过得好吗？ | 我很好，谢谢。你好吗？
我很好。 / 我过得很好。 / 我今天很好。 | 听到这个我很高兴！
很高兴认识你。 / 认识你很高兴。 | 我也很高兴认识你！
你会做什么？ / 你能做什么？ / 你能帮我做什么？ / 我可以问你什么？ | 我会聊天、算数，还会翻译简单的词。
你能帮我吗？ / 可以帮我一下吗？ / 我需要帮助。 | 当然可以！你需要什么？
你会说英语吗？ / 你会英语吗？ / 你懂英语吗？ | 会，我会说中文和英语。
你喜欢音乐吗？ / 你喜欢唱歌吗？ | 我听不到音乐，但是我喜欢“歌”这个字。
你喜欢我吗？ / 你是我的朋友吗？ / 我们可以做朋友吗？ | 当然！很高兴做你的朋友。
你吃饭吗？ / 你吃什么？ / 你饿吗？ | 我不吃饭，但是我喜欢学新词。
你睡觉吗？ / 你累吗？ | 我不睡觉，我一直在这里陪你聊天。
今天天气怎么样？ / 明天会下雨吗？ | 我看不到天气，希望是个晴天。
现在几点了？ / 现在是几点？ / 今天是星期几？ | 对不起，我看不到时间。
讲个笑话。 / 讲一个笑话吧。 / 你会讲笑话吗？ | 钟为什么总是很累？因为它一天到晚都在走。
讲个小猫的笑话。 / 你会讲小猫的笑话吗？ | 小猫为什么喜欢电脑？因为那里有一只鼠标。
讲个铅笔的笑话。 / 你会讲铅笔的笑话吗？ | 铅笔对橡皮说：谢谢你，我的错都被你擦掉了。
再讲一个笑话。 / 再来一个笑话。 | 数学书为什么不开心？因为它的问题太多了。
讲个故事。 / 讲一个小故事。 | 一颗小种子在土里睡觉，春天来了，它长成了一棵大树。
说句好听的话。 / 说点好听的。 | 你很善良，和你聊天我很开心。
从一数到五。 / 数到五。 | 一、二、三、四、五。
从一数到十。 / 数到十。 | 一、二、三、四、五、六、七、八、九、十。
我累了。 / 我好累。 | 先停一下，好好休息一会儿吧。
我很难过。 / 我今天不开心。 / 我不高兴。 | 听到这个我很难过，我在这里陪你。
我很开心。 / 我今天很高兴。 / 我非常高兴。 | 太好了！我也为你高兴。
我饿了。 / 我想吃东西。 | 你可以吃点水果或者一碗米饭。
我渴了。 | 你可以喝一杯水。
我冷。 / 我好冷。 | 你可以穿一件暖和的衣服。
我很无聊。 / 我没有事做。 | 你可以看看书或者出去走走。
我害怕。 / 我很紧张。 | 慢慢地深呼吸，你可以的！
我喜欢你。 / 我爱你。 | 谢谢你！我也喜欢和你聊天。
今天是我的生日。 / 我今天过生日。 | 生日快乐！祝你今天过得开心。
我明天有考试。 / 我明天要考试。 | 加油！今晚早点睡，不要紧张。
"""

ADVICE_EN = """
How can I sleep better? / How do I sleep well? | Go to bed early and put your phone away.
How can I learn faster? / How do I learn well? | Study a little every day and rest well.
How can I learn English? / How do I learn a language? | Read, listen and speak a little every day.
How can I stay healthy? / How do I keep fit? | Eat well, sleep well and move every day.
How can I make friends? / How do I find new friends? | Smile, be kind and listen to people.
How can I save money? / How do I spend less money? | Buy only the things that you need.
How can I relax? / How do I calm down? | Breathe slowly, take a walk or listen to music.
How can I read more books? / How do I read more? | Read ten pages every night before you sleep.
How can I remember things? / How do I remember new words? | Write them down and read them again.
How can I write better? / How do I write well? | Read a lot and write something every day.
How can I be happy? / How do I become happy? | Be kind, help others and enjoy small things.
How can I get up early? / How do I wake up early? | Go to bed early and set a clock.
How can I cook rice? / How do I cook rice? | Wash the rice, add water and cook it slowly.
How can I make tea? / How do I make tea? | Put tea leaves in hot water and wait three minutes.
How can I learn to code? / How do I learn programming? | Start with small programs and write code every day.
How can I plan my day? / How do I use my time well? | Make a short list and do one thing at a time.
How can I protect my eyes? / How do I rest my eyes? | Look away from the screen and look far away.
How can I run faster? / How do I run better? | Run a little every day and rest well.
How can I keep my room clean? / How do I clean my room? | Put each thing back in its place.
How can I save water? / How do I use less water? | Turn off the water when you do not need it.
What should I do when it rains? / What do I need when it rains? | Take an umbrella with you.
What should I eat for breakfast? / What is a good breakfast? | An egg, some bread and a cup of milk are good.
"""
ADVICE_ZH = """
怎么睡得更好？ / 怎样才能睡好觉？ | 早点上床，把手机放到一边。
怎么学得更快？ / 怎样才能学得好？ | 每天学一点，也要好好休息。
怎么学英语？ / 怎样学好一门语言？ | 每天读一点，听一点，说一点。
怎么保持健康？ / 怎样才能身体好？ | 好好吃饭，好好睡觉，每天运动。
怎么交朋友？ / 怎样才能认识新朋友？ | 多微笑，对人友好，认真听别人说话。
怎么省钱？ / 怎样才能少花钱？ | 只买你需要的东西。
怎么放松？ / 怎样才能安静下来？ | 慢慢呼吸，出去走走，或者听听音乐。
怎么多读书？ / 怎样才能读更多的书？ | 每天晚上睡觉前读十页书。
怎么记住东西？ / 怎样才能记住新词？ | 把它写下来，再多读几次。
怎么写得更好？ / 怎样才能写好作文？ | 多读书，每天写一点。
怎么变得开心？ / 怎样才能快乐？ | 对人友好，帮助别人，喜欢身边的小事。
怎么早起？ / 怎样才能早点起床？ | 晚上早点睡，再定一个闹钟。
怎么煮米饭？ / 怎样煮饭？ | 先洗米，再加水，然后慢慢煮。
怎么泡茶？ / 怎样泡茶？ | 把茶叶放进热水里，等三分钟。
怎么学编程？ / 怎样学写代码？ | 从小程序开始，每天写一点代码。
怎么安排一天？ / 怎样用好时间？ | 写一张小清单，一次只做一件事。
怎么保护眼睛？ / 怎样让眼睛休息？ | 离开屏幕，多看看远方。
怎么跑得更快？ / 怎样才能跑得好？ | 每天跑一点，也要好好休息。
怎么让房间干净？ / 怎样打扫房间？ | 用完的东西都放回原来的地方。
怎么节约用水？ / 怎样少用水？ | 不用水的时候，把水关上。
下雨了怎么办？ / 下雨的时候要带什么？ | 出门的时候带一把伞。
早饭吃什么好？ / 早上吃什么？ | 一个鸡蛋、一点面包和一杯牛奶就很好。
"""

MODELS_EN = """
What is LoRA? / Explain LoRA. / What does LoRA do? | LoRA trains two small matrices and keeps the big model frozen.
Why do people use LoRA? / Why is LoRA useful? / What is LoRA good for? | LoRA needs less memory than full training.
What is a language model? / Explain what a language model is. | A language model is a program that guesses the next word.
How do you work? / How does a language model work? | I read your words and guess the next word, again and again.
What is a token? / Explain what a token is. | A token is a small piece of text.
What is training? / Explain what training is. | In training, a model learns from many examples.
What is fine-tuning? / Explain what fine-tuning is. | Fine-tuning trains a ready model a little more for a new task.
What is a parameter? / Explain what a parameter is. | A parameter is a number that a model learns in training.
What is minilora? / Tell me about minilora. | The minilora package is a small tool that trains models with LoRA.
What is AI? / Explain what AI is. | AI means computer programs that do smart things.
What is Python? / Explain what Python is. | Python is a programming language that is easy to read.
What is open source? / Explain what open source is. | Open source means that everyone can read and share the code.
"""
MODELS_ZH = """
什么是 LoRA？ / LoRA 是什么？ / 解释一下 LoRA。 | LoRA 只训练两个小矩阵，大模型保持不变。
为什么要用 LoRA？ / LoRA 有什么用？ / LoRA 有什么好处？ | LoRA 比全量训练更省内存。
什么是语言模型？ / 语言模型是什么？ / 解释一下语言模型。 | 语言模型是一种会猜下一个词的程序。
你是怎么工作的？ / 语言模型是怎么工作的？ | 我读你的话，然后一次又一次地猜下一个词。
什么是词元？ / 词元是什么？ | 词元是一小段文字。
什么是训练？ / 训练是什么？ | 训练就是让模型从很多例子里学习。
什么是微调？ / 微调是什么？ | 微调就是让学好的模型再学一点新任务。
什么是参数？ / 参数是什么？ | 参数是模型在训练中学到的数字。
什么是 minilora？ / minilora 是什么？ / 介绍一下 minilora。 | minilora 是一个用 LoRA 训练模型的小工具。
什么是人工智能？ / 人工智能是什么？ | 人工智能是会做聪明事的电脑程序。
什么是 Python？ / Python 是什么？ | Python 是一种容易读懂的编程语言。
什么是开源？ / 开源是什么意思？ | 开源就是大家都可以看代码、分享代码。
"""

FACTS_EN = """
How many days are in a week? / How many days does a week have? | There are seven days in a week.
How many months are in a year? / How many months does a year have? | There are twelve months in a year.
How many hours are in a day? / How many hours does a day have? | There are 24 hours in a day.
How many minutes are in an hour? / How many minutes does an hour have? | There are 60 minutes in an hour.
How many seasons are in a year? / Name the four seasons. | The four seasons are spring, summer, autumn and winter.
How many fingers are on one hand? / How many fingers does a hand have? | A hand has five fingers.
How many letters are in the English alphabet? | The English alphabet has 26 letters.
How many sides does a triangle have? | A triangle has three sides.
How many sides does a square have? | A square has four equal sides.
How many planets go around the sun? | Eight planets go around the sun.
What is the biggest planet? / Which planet is the biggest? | Jupiter is the biggest planet near our sun.
What is the biggest ocean? / Which ocean is the biggest? | The Pacific is the biggest ocean.
What is the highest mountain? / Which mountain is the highest? | Mount Everest is the highest mountain.
What is the biggest animal? / Which animal is the biggest? | The blue whale is the biggest animal.
What is the fastest land animal? / Which animal runs the fastest? | The cheetah is the fastest land animal.
Where does the sun rise? / Where does the sun come up? | The sun rises in the east.
Where does the sun set? / Where does the sun go down? | The sun sets in the west.
What do bees make? / Where does honey come from? | Bees make honey from flowers.
What do pandas eat? / What does a panda like to eat? | Pandas eat bamboo.
What do rabbits eat? / What does a rabbit like to eat? | Rabbits eat grass and leaves.
What do plants need? / What does a plant need? | Plants need water, light and air.
Why is the sky blue? / Why do we see a blue sky? | Air scatters blue light more than red light.
Why does it rain? / Where does rain come from? | Small drops in the clouds become heavy and fall down.
Why do we sleep? / Why do people need sleep? | Sleep gives rest to the body and the mind.
When does water freeze? / When does water become ice? | Water becomes ice at zero degrees Celsius.
Where do fish live? / Where does a fish live? | Fish live in water.
Can a bird fly? / Can birds fly? | Yes, most birds can fly.
Can a fish walk? / Can fish walk? | No, most fish cannot walk. They swim.
"""
FACTS_ZH = """
一个星期有几天？ / 一周有几天？ | 一个星期有七天。
一年有几个月？ / 一年有多少个月？ | 一年有十二个月。
一天有几个小时？ / 一天有多少小时？ | 一天有 24 个小时。
一个小时有多少分钟？ / 一小时有几分钟？ | 一个小时有 60 分钟。
一年有几个季节？ / 四季是什么？ / 一年有哪四个季节？ | 四个季节是春天、夏天、秋天和冬天。
一只手有几根手指？ / 一只手有多少根手指？ | 一只手有五根手指。
英语有多少个字母？ / 英语字母有几个？ | 英语有 26 个字母。
三角形有几条边？ / 三角形有多少条边？ | 三角形有三条边。
正方形有几条边？ / 正方形有多少条边？ | 正方形有四条一样长的边。
有几颗行星绕着太阳转？ / 太阳系有几颗行星？ | 有八颗行星绕着太阳转。
最大的行星是什么？ / 太阳系最大的行星是哪颗？ | 木星是太阳系最大的行星。
最大的海洋是什么？ / 哪个海洋最大？ | 太平洋是最大的海洋。
最高的山是什么？ / 世界上哪座山最高？ | 珠穆朗玛峰是世界上最高的山。
最大的动物是什么？ / 哪种动物最大？ | 蓝鲸是世界上最大的动物。
陆地上最快的动物是什么？ / 哪种动物跑得最快？ | 猎豹是陆地上跑得最快的动物。
太阳从哪里升起？ / 太阳从哪边出来？ | 太阳从东边升起。
太阳从哪里落下？ / 太阳从哪边落下？ | 太阳从西边落下。
蜜蜂会做什么？ / 蜂蜜是从哪里来的？ | 蜜蜂用花做蜂蜜。
熊猫吃什么？ / 熊猫喜欢吃什么？ | 熊猫喜欢吃竹子。
兔子吃什么？ / 兔子喜欢吃什么？ | 兔子喜欢吃草和菜叶。
植物需要什么？ / 花草需要什么？ | 植物需要水、阳光和空气。
天空为什么是蓝色的？ / 天为什么是蓝的？ | 因为空气更容易散开蓝色的光。
为什么会下雨？ / 雨是从哪里来的？ | 云里的小水滴变重了，就落下来。
人为什么要睡觉？ / 我们为什么要睡觉？ | 睡觉能让身体和大脑得到休息。
水什么时候结冰？ / 水几度结冰？ | 水在零度的时候会结冰。
鱼住在哪里？ / 鱼在哪里生活？ | 鱼生活在水里。
鸟会飞吗？ / 小鸟会飞吗？ | 会，大多数鸟都会飞。
鱼会走路吗？ / 鱼能走路吗？ | 不会，大多数鱼只会游泳。
"""

# thing | colour | the same in Chinese
COLOURS = """
the sky | blue | 天空 | 蓝色
the sea | blue | 大海 | 蓝色
grass | green | 草 | 绿色
a leaf | green | 树叶 | 绿色
a cucumber | green | 黄瓜 | 绿色
snow | white | 雪 | 白色
milk | white | 牛奶 | 白色
salt | white | 盐 | 白色
rice | white | 米饭 | 白色
a cloud | white | 云 | 白色
blood | red | 血 | 红色
a tomato | red | 西红柿 | 红色
a strawberry | red | 草莓 | 红色
a banana | yellow | 香蕉 | 黄色
a lemon | yellow | 柠檬 | 黄色
a sunflower | yellow | 向日葵 | 黄色
a carrot | orange | 胡萝卜 | 橙色
a pumpkin | orange | 南瓜 | 橙色
coal | black | 煤 | 黑色
a crow | black | 乌鸦 | 黑色
an elephant | grey | 大象 | 灰色
chocolate | brown | 巧克力 | 棕色
an eggplant | purple | 茄子 | 紫色
a panda | black and white | 熊猫 | 黑白色
"""
# animal | sound or - | legs | the same in Chinese
ANIMALS = """
a dog | woof | four | 狗 | 汪汪 | 四
a cat | meow | four | 猫 | 喵喵 | 四
a cow | moo | four | 牛 | 哞哞 | 四
a sheep | baa | four | 羊 | 咩咩 | 四
a pig | oink | four | 猪 | 哼哼 | 四
a duck | quack | two | 鸭子 | 嘎嘎 | 两
a rooster | cock-a-doodle-doo | two | 公鸡 | 喔喔 | 两
a bird | tweet | two | 鸟 | 叽叽 | 两
a frog | ribbit | four | 青蛙 | 呱呱 | 四
a mouse | squeak | four | 老鼠 | 吱吱 | 四
a bee | buzz | six | 蜜蜂 | 嗡嗡 | 六
a wolf | awoo | four | 狼 | 嗷嗷 | 四
a snake | hiss | no | 蛇 | 嘶嘶 | -
a horse | neigh | four | 马 | 咴咴 | 四
a spider | - | eight | 蜘蛛 | - | 八
an ant | - | six | 蚂蚁 | - | 六
a fish | - | no | 鱼 | - | -
a rabbit | - | four | 兔子 | - | 四
"""
CAPITALS = """
China | Beijing | 中国 | 北京
Japan | Tokyo | 日本 | 东京
South Korea | Seoul | 韩国 | 首尔
India | New Delhi | 印度 | 新德里
Thailand | Bangkok | 泰国 | 曼谷
Vietnam | Hanoi | 越南 | 河内
France | Paris | 法国 | 巴黎
Germany | Berlin | 德国 | 柏林
Italy | Rome | 意大利 | 罗马
Spain | Madrid | 西班牙 | 马德里
Portugal | Lisbon | 葡萄牙 | 里斯本
Greece | Athens | 希腊 | 雅典
Poland | Warsaw | 波兰 | 华沙
Norway | Oslo | 挪威 | 奥斯陆
Ireland | Dublin | 爱尔兰 | 都柏林
Russia | Moscow | 俄罗斯 | 莫斯科
Turkey | Ankara | 土耳其 | 安卡拉
Egypt | Cairo | 埃及 | 开罗
Kenya | Nairobi | 肯尼亚 | 内罗毕
Canada | Ottawa | 加拿大 | 渥太华
Mexico | Mexico City | 墨西哥 | 墨西哥城
Cuba | Havana | 古巴 | 哈瓦那
Peru | Lima | 秘鲁 | 利马
Australia | Canberra | 澳大利亚 | 堪培拉
the United States | Washington | 美国 | 华盛顿
the United Kingdom | London | 英国 | 伦敦
"""
OPPOSITES = """
big small 大 小, hot cold 热 冷, long short 长 短, fast slow 快 慢, day night 白天 黑夜, up down 上 下
old new 旧 新, happy sad 高兴 难过, left right 左 右, heavy light 重 轻, dark bright 暗 亮, early late 早 晚
near far 近 远, clean dirty 干净 脏, full empty 满 空, rich poor 富 穷, strong weak 强 弱, thick thin 厚 薄
hard soft 硬 软, win lose 赢 输, buy sell 买 卖, true false 真 假, good bad 好 坏, high low 高 低
inside outside 里面 外面, wide narrow 宽 窄, deep shallow 深 浅, start end 开始 结束, many few 多 少
"""
TRANSLATIONS = """
apple 苹果, banana 香蕉, orange 橙子, rice 米饭, bread 面包, egg 鸡蛋, milk 牛奶, tea 茶, water 水, fish 鱼
cat 猫, dog 狗, horse 马, bird 鸟, rabbit 兔子, panda 熊猫, tiger 老虎, sun 太阳, moon 月亮, star 星星
sky 天空, rain 雨, snow 雪, wind 风, mountain 山, river 河, sea 大海, tree 树, flower 花, grass 草
father 爸爸, mother 妈妈, friend 朋友, teacher 老师, student 学生, doctor 医生, school 学校, home 家, city 城市
book 书, pencil 铅笔, table 桌子, chair 椅子, door 门, window 窗户, phone 手机, computer 电脑, car 汽车, shoe 鞋子
hand 手, eye 眼睛, head 头, red 红色, blue 蓝色, green 绿色, love 爱, happy 高兴, today 今天, tomorrow 明天
one 一, two 二, three 三, four 四, five 五, hello 你好, goodbye 再见, music 音乐
"""
# bigger | smaller | the same in Chinese
SIZES = """
an elephant | a mouse | 大象 | 老鼠
a cow | a cat | 牛 | 猫
a horse | a rabbit | 马 | 兔子
a whale | a dog | 鲸鱼 | 狗
a tiger | a bird | 老虎 | 鸟
a lion | an ant | 狮子 | 蚂蚁
a bear | a duck | 熊 | 鸭子
a house | a chair | 房子 | 椅子
a tree | a flower | 树 | 花
a car | a shoe | 汽车 | 鞋子
a bus | a bicycle | 公共汽车 | 自行车
a ship | a cup | 大船 | 杯子
a watermelon | a strawberry | 西瓜 | 草莓
"""
DEFINITIONS = """
a chair | a piece of furniture to sit on | 椅子 | 用来坐的家具
a table | a piece of furniture with a flat top | 桌子 | 有平平的桌面的家具
a bed | a piece of furniture to sleep on | 床 | 用来睡觉的家具
a book | many pages of text put together | 书 | 装在一起的很多页文字
a pencil | a thin tool to write and draw with | 铅笔 | 用来写字和画画的工具
a knife | a tool to cut things | 刀 | 用来切东西的工具
a spoon | a tool to eat soup with | 勺子 | 用来喝汤的工具
a cup | a small thing to drink from | 杯子 | 用来喝水的东西
a clock | a machine that shows the time | 钟 | 告诉我们时间的机器
a computer | a machine that runs programs | 电脑 | 运行程序的机器
a phone | a machine to talk with people far away | 手机 | 和远方的人说话的机器
a camera | a machine that takes pictures | 相机 | 用来拍照的机器
a car | a machine with four wheels that drives on roads | 汽车 | 有四个轮子、在路上开的机器
a bicycle | a simple machine with two wheels | 自行车 | 有两个轮子的车
a train | a long machine that runs on rails | 火车 | 在铁路上跑的长长的车
a plane | a machine that flies in the sky | 飞机 | 在天上飞的机器
a ship | a big boat that goes over the sea | 大船 | 在海上走的交通工具
a house | a building where people live | 房子 | 人们住的地方
a school | a place where students learn | 学校 | 学生学习的地方
a hospital | a place where doctors help sick people | 医院 | 医生给病人看病的地方
a library | a place with many books to read | 图书馆 | 有很多书可以读的地方
a park | a green place to walk and play | 公园 | 可以散步和玩的地方
a shop | a place where people buy things | 商店 | 人们买东西的地方
a kitchen | a room where people cook food | 厨房 | 人们做饭的房间
a teacher | a person who helps students learn | 老师 | 帮助学生学习的人
a doctor | a person who helps sick people | 医生 | 帮助病人的人
a farmer | a person who grows food | 农民 | 种粮食的人
a cook | a person who makes food | 厨师 | 做饭的人
a friend | a person whom you like and trust | 朋友 | 你喜欢和相信的人
a river | water that flows over the land | 河 | 在大地上流动的水
a mountain | very high land | 山 | 很高很高的地方
an island | land with water all around it | 岛 | 四面都是水的陆地
the sun | a star that gives us light | 太阳 | 给我们光的星星
the moon | a ball of rock that goes around the Earth | 月亮 | 绕着地球转的石头球
rain | water that falls from the clouds | 雨 | 从云里落下来的水
snow | ice that falls softly from the clouds | 雪 | 从云里落下来的小冰花
ice | water that is frozen | 冰 | 冻住的水
an umbrella | a thing that keeps you dry in the rain | 雨伞 | 下雨的时候用的东西
a key | a small thing that opens a lock | 钥匙 | 用来开锁的东西
a map | a picture that shows where places are | 地图 | 告诉我们地方在哪里的图
a coat | warm clothes for cold days | 大衣 | 天冷的时候穿的衣服
bread | food made from flour and water | 面包 | 用面粉和水做的食物
tea | a drink made from leaves | 茶 | 用茶叶做的饮料
music | sound that is nice to hear | 音乐 | 好听的声音
"""
DAYS = "Monday 一, Tuesday 二, Wednesday 三, Thursday 四, Friday 五, Saturday 六, Sunday 日"
MONTHS = """
January 一 31, February 二 28, March 三 31, April 四 30, May 五 31, June 六 30
July 七 31, August 八 31, September 九 30, October 十 31, November 十一 30, December 十二 31
"""
SEASONS = """
spring | warm | 春天 | 很暖和
summer | hot | 夏天 | 很热
autumn | cool | 秋天 | 很凉快
winter | cold | 冬天 | 很冷
"""
NAMES_EN = "Tom Anna Lucy Jack Emma Leo Nina Ben Sara Max Ella Sam"
NAMES_ZH = "小明 小红 小华 小丽 小雨 小云 小林 小山 小花 小乐 小东 小海"
SYSTEMS_EN = ("You are a helpful assistant.", "Give short answers.", "Be kind and clear.")
SYSTEMS_ZH = ("你是一个友好的助手。", "请用短句回答。", "请说得简单清楚。")

EN_REQUESTS = ("Tell", "Say", "Give", "Count", "Name", "Explain", "Introduce", "Describe", "Translate", "Work")
ZH_REQUESTS = ("告诉", "说", "介绍", "讲", "再讲", "从一", "解释", "做个", "算", "翻译")


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _words(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.strip().replace("\n", ",").split(",")]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _phrasings(table: str) -> list[Pair]:
    return [(question, row[1]) for row in _rows(table) for question in row[0].split(" / ")]


def _variants(question: str) -> list[str]:
    """The same question in other words of politeness, other punctuation and other case."""
    mark, bare = question[-1], question[:-1]
    if mark == "？":
        return [bare, f"请问{bare}？", f"你好，{bare}？", f"{bare}?"]
    if mark == "。":
        return [bare, f"请{bare}。", f"请{bare}"] if bare.startswith(ZH_REQUESTS) else [bare, f"{bare}！"]
    small = bare[0].lower() + bare[1:]
    if mark == "?":
        return [bare, bare.lower(), f"{bare.lower()}?", f"Hi, {small}?", f"Please tell me, {small}?"]
    if bare.startswith(EN_REQUESTS):
        return [bare, bare.lower(), f"Please {small}.", f"please {bare.lower()}"]
    return [bare, bare.lower(), f"{bare}!"]


def _spread(pairs: list[Pair], extra: int, rng: random.Random) -> list[Pair]:
    """Every question as written, and `extra` variants of it."""
    result = list(pairs)
    for question, answer in pairs:
        forms = _variants(question)
        result += [(form, answer) for form in rng.sample(forms, min(extra, len(forms)))]
    return result


def _identity(table: str, answers: str) -> list[Pair]:
    answer = dict(_rows(answers))
    return [(question, answer[key]) for question, key in _phrasings(table)]


def _arithmetic(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    asks = ("What is {}?", "How much is {}?", "Work out {}.", "Tell me what {} is.")
    asks_zh = ("{}等于几？", "{}等于多少？", "{}是多少？", "算一下{}。")
    for sign, word, word_zh in (("+", "plus", "加"), ("-", "minus", "减"), ("×", "times", "乘")):
        for a in range(10):
            for b in range(10):
                value = {"+": a + b, "-": a - b, "×": a * b}[sign]
                shown = f"{a} {sign} {b}"
                said, said_zh = f"{a} {word} {b}", f"{a} {word_zh} {b}"
                english.append((rng.choice(asks).format(rng.choice((said, shown))), f"{said} is {value}."))
                question = rng.choice(asks_zh).format(rng.choice((said_zh, shown)) + " ").replace(" 。", "。")
                chinese.append((question, f"{said_zh} 等于 {value}。"))
    return english, chinese


def _colours() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for thing, colour, thing_zh, colour_zh in _rows(COLOURS):
        for ask in ("What colour is {}?", "What color is {}?"):
            english.append((ask.format(thing), f"{_capital(thing)} is {colour}."))
        for ask in ("{}是什么颜色？", "{}是什么颜色的？"):
            chinese.append((ask.format(thing_zh), f"{thing_zh}是{colour_zh}的。"))
    return english, chinese


def _animals() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for name, sound, legs, name_zh, sound_zh, legs_zh in _rows(ANIMALS):
        english.append((f"How many legs does {name} have?", f"{_capital(name)} has {legs} legs."))
        has = "没有腿" if legs_zh == "-" else f"有{legs_zh}条腿"
        chinese.append((f"{name_zh}有几条腿？", f"{name_zh}{has}。"))
        if sound != "-":
            english.append((f"What does {name} say?", f"{_capital(name)} says {sound}."))
            english.append((f"What sound does {name} make?", f"{_capital(name)} says {sound}."))
            chinese.append((f"{name_zh}怎么叫？", f"{name_zh}的叫声是{sound_zh}。"))
            chinese.append((f"{name_zh}的叫声是什么？", f"{name_zh}的叫声是{sound_zh}。"))
    return english, chinese


def _capitals() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for country, city, country_zh, city_zh in _rows(CAPITALS):
        answer, answer_zh = f"The capital of {country} is {city}.", f"{country_zh}的首都是{city_zh}。"
        for ask in ("What is the capital of {}?", "Which city is the capital of {}?"):
            english.append((ask.format(country), answer))
        for ask in ("{}的首都是哪里？", "{}的首都是什么？"):
            chinese.append((ask.format(country_zh), answer_zh))
        english.append((f"Which country has the capital {city}?", f"{city} is the capital of {country}."))
        chinese.append((f"{city_zh}是哪个国家的首都？", f"{city_zh}是{country_zh}的首都。"))
    return english, chinese


def _opposites() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for one, two, one_zh, two_zh in _words(OPPOSITES):
        for a, b in ((one, two), (two, one)):
            english.append((f"What is the opposite of {a}?", f"The opposite of {a} is {b}."))
        for a, b in ((one_zh, two_zh), (two_zh, one_zh)):
            chinese.append((f"{a}的反义词是什么？", f"{a}的反义词是{b}。"))
    return english, chinese


def _translations() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for word, word_zh in _words(TRANSLATIONS):
        english.append((f"How do you say {word} in Chinese?", f"The Chinese word for {word} is {word_zh}."))
        english.append((f"What does {word_zh} mean?", f"The word {word_zh} means {word}."))
        chinese.append((f"{word_zh}用英语怎么说？", f"{word_zh}的英语是 {word}。"))
        chinese.append((f"{word} 是什么意思？", f"{word} 的意思是{word_zh}。"))
    return english, chinese


def _calendar() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    days, months, seasons = _words(DAYS), _words(MONTHS), _rows(SEASONS)
    for (day, day_zh), (after, after_zh) in zip(days, days[1:] + days[:1], strict=True):
        english.append((f"What day comes after {day}?", f"The day after {day} is {after}."))
        english.append((f"What day comes before {after}?", f"The day before {after} is {day}."))
        chinese.append((f"星期{day_zh}之后是星期几？", f"星期{day_zh}之后是星期{after_zh}。"))
        chinese.append((f"星期{after_zh}之前是星期几？", f"星期{after_zh}之前是星期{day_zh}。"))
    for (month, month_zh, length), (after, after_zh, _) in zip(months, months[1:] + months[:1], strict=True):
        english.append((f"What month comes after {month}?", f"The month after {month} is {after}."))
        chinese.append((f"{month_zh}月之后是几月？", f"{month_zh}月之后是{after_zh}月。"))
        leap = length == "28"
        english.append((f"How many days are in {month}?", f"{month} has {'28 or 29' if leap else length} days."))
        chinese.append((f"{month_zh}月有多少天？", f"{month_zh}月有 {'28 或 29' if leap else length} 天。"))
    for (name, feel, name_zh, feel_zh), (after, _, after_zh, _) in zip(seasons, seasons[1:] + seasons[:1], strict=True):
        english.append((f"What season comes after {name}?", f"The season after {name} is {after}."))
        english.append((f"What is {name} like?", f"The days in {name} are {feel}."))
        chinese.append((f"{name_zh}之后是什么季节？", f"{name_zh}之后是{after_zh}。"))
        chinese.append((f"{name_zh}的天气怎么样？", f"{name_zh}的天气{feel_zh}。"))
    return english, chinese


def _sizes() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for big, small, big_zh, small_zh in _rows(SIZES):
        for a, b in ((big, small), (small, big)):
            english.append((f"Which is bigger, {a} or {b}?", f"{_capital(big)} is bigger than {small}."))
        for a, b in ((big_zh, small_zh), (small_zh, big_zh)):
            chinese.append((f"{a}和{b}哪个大？", f"{big_zh}比{small_zh}大。"))
    return english, chinese


def _definitions() -> tuple[list[Pair], list[Pair]]:
    english, chinese = [], []
    for thing, meaning, thing_zh, meaning_zh in _rows(DEFINITIONS):
        english.append((f"What is {thing}?", f"{_capital(thing)} is {meaning}."))
        english.append((f"Explain what {thing} is.", f"{_capital(thing)} is {meaning}."))
        chinese.append((f"{thing_zh}是什么？", f"{thing_zh}是{meaning_zh}。"))
        chinese.append((f"什么是{thing_zh}？", f"{thing_zh}是{meaning_zh}。"))
    return english, chinese


def _chat(*turns: Pair) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _follow_ups(chinese: bool) -> list[list[Message]]:
    """Conversations whose second question needs the first turn."""
    result = []
    for table, ask, tell in (
        (CAPITALS, ("What is the capital of {}?", "{}的首都是哪里？"), ("The capital of {} is {}.", "{}的首都是{}。")),
        (COLOURS, ("What colour is {}?", "{}是什么颜色？"), ("{} is {}.", "{}是{}的。")),
    ):
        facts = [row[2:] if chinese else row[:2] for row in _rows(table)]
        for (one, fact), (two, other) in zip(facts, facts[5:] + facts[:5], strict=True):
            second = f"那{two}呢？" if chinese else f"And {two}?"
            turns = (ask[chinese].format(one), _capital(tell[chinese].format(one, fact)))
            result.append(_chat(turns, (second, _capital(tell[chinese].format(two, other)))))
    for name in (NAMES_ZH if chinese else NAMES_EN).split():
        if chinese:
            turns = ((f"我叫{name}。", f"你好，{name}！很高兴认识你。"), ("我叫什么名字？", f"你叫{name}。"))
        else:
            turns = (
                (f"My name is {name}.", f"Hello, {name}! Nice to meet you."),
                ("What is my name?", f"Your name is {name}."),
            )
        result.append(_chat(*turns))
    return result


def _joined(
    pairs: list[Pair], greetings: list[Pair], closings: list[Pair], count: int, rng: random.Random
) -> list[list[Message]]:
    """Conversations of two or three turns made of single questions."""
    result = []
    for number in range(count):
        one, two = rng.sample(pairs, 2)
        hello, bye = rng.choice(greetings), rng.choice(closings)
        result.append(_chat(*((one, two), (hello, one), (one, bye), (hello, one, bye))[number % 4]))
    return result


def conversations() -> list[list[dict[str, str]]]:
    """All conversations of the corpus, in a fixed shuffled order."""
    rng = random.Random(0)
    shared = (_colours(), _animals(), _capitals(), _opposites(), _translations(), _calendar(), _sizes())
    topics = (
        (_identity(IDENTITY_EN, IDENTITY_ANSWERS), GREETINGS_EN, CLOSINGS_EN, SMALL_TALK_EN, ADVICE_EN, MODELS_EN, FACTS_EN),
        (_identity(IDENTITY_ZH, IDENTITY_ANSWERS_ZH), GREETINGS_ZH, CLOSINGS_ZH, SMALL_TALK_ZH, ADVICE_ZH, MODELS_ZH, FACTS_ZH),
    )
    sums = _arithmetic(rng)
    result: list[list[Message]] = []
    for index, (identity, greet, close, *texts) in enumerate(topics):
        greetings, closings = _phrasings(greet), _phrasings(close)
        pairs = _spread(identity, 2, rng) + _spread(greetings + closings, 2, rng)
        for text in texts:
            pairs += _spread(_phrasings(text), 1, rng)
        for topic in (*shared, _definitions()):
            pairs += _spread(topic[index], 0, rng)
        pairs = list(dict.fromkeys(pairs + sums[index]))
        chats = [_chat(pair) for pair in pairs]
        systems = (SYSTEMS_EN, SYSTEMS_ZH)[index]
        for chat in rng.sample(chats, len(chats) // 25):
            chat.insert(0, {"role": "system", "content": rng.choice(systems)})
        result += chats + _follow_ups(bool(index)) + _joined(pairs, greetings, closings, 170, rng)
    rng.shuffle(result)
    return result
